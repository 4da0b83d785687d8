# The units of deploy/units.json as NixOS wants them. `places` says what stands for each name between at signs, and
# `changes` what this host sets otherwise: { UNIT.SECTION.SETTING = VALUE; }. It must not know what the programs do.
{
  places,
  changes ? { },
}:
let
  source = builtins.fromJSON (builtins.readFile ../deploy/units.json);
  names = builtins.attrNames places;

  fillText =
    text:
    let
      filled = builtins.replaceStrings (map (name: "@${name}@") names) (map (
        name: places.${name}
      ) names) text;
      left = builtins.match ".*(@[a-z_]+@).*" filled;
    in
    if left == null then
      filled
    else
      throw "deploy/units.json: nothing is known to stand for ${builtins.head left}";
  fill = value: if builtins.isList value then map fillText value else fillText value;

  toList = value: if builtins.isList value then value else [ value ];

  # Every section of a unit as it is in the end.
  sections =
    name: unit:
    let
      own = removeAttrs unit [ "profile" ];
      profile = if unit ? profile then source.profiles.${unit.profile} else { };
      base = if unit ? Service then own // { Service = profile // unit.Service; } else own;
      changed = changes.${name} or { };
      section = which: (base.${which} or { }) // (changed.${which} or { });
      all = builtins.attrNames (base // changed);
    in
    builtins.listToAttrs (
      map (which: {
        name = which;
        value = builtins.mapAttrs (_: fill) (section which);
      }) all
    );

  ofKind =
    kind: units:
    builtins.listToAttrs (
      builtins.concatMap (
        full:
        let
          match = builtins.match "(.*)\\.${kind}" full;
        in
        if match == null then
          [ ]
        else
          [
            {
              name = builtins.head match;
              value = sections full units.${full};
            }
          ]
      ) (builtins.attrNames units)
    );

  common = unit: {
    unitConfig = unit.Unit or { };
    wantedBy = toList (unit.Install.WantedBy or [ ]);
  };
  service = unit: common unit // { serviceConfig = unit.Service; };
  socket = unit: common unit // { socketConfig = unit.Socket; };
  timer = unit: common unit // { timerConfig = unit.Timer; };
  mount =
    unit:
    common unit
    // {
      what = unit.Mount.What;
      where = unit.Mount.Where;
      type = unit.Mount.Type;
      options = unit.Mount.Options;
    };
  kinds = units: {
    services = builtins.mapAttrs (_: service) (ofKind "service" units);
    sockets = builtins.mapAttrs (_: socket) (ofKind "socket" units);
    timers = builtins.mapAttrs (_: timer) (ofKind "timer" units);
    mounts = map mount (builtins.attrValues (ofKind "mount" units));
  };
in
{
  system = kinds source.system;
  user = kinds source.user;
  tmpfiles = map fillText source.tmpfiles;
}
