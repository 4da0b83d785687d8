# What `cargo xtask test` compares with the other readers of the same files. `units` are the unit files that the module
# makes, as text, with the places that it filled in: `cargo xtask units` must write the same. `settings` is a
# configuration file with every key that there is: choir-hypervisor must know them all.
let
  lib = import ./library.nix;
  evaluated = import ./evaluated.nix { inherit lib; };
  inherit (builtins) attrNames concatStringsSep map;
  config = evaluated.of {
    services.choir = {
      settings = import ./every-setting.nix;
      secrets.required.key = "/run/keys/key";
      backup.enable = true;
      drill.enable = true;
      doctor.enable = true;
      operatorTokenFile = "/etc/choir/operator-token";
    };
  };
  # With the required credential it would differ.
  plain = evaluated.of {
    services.choir = {
      backup.enable = true;
      drill.enable = true;
      doctor.enable = true;
      operatorTokenFile = "/etc/choir/operator-token";
    };
  };

  line = name: value: "${name}=${value}\n";
  lines =
    name: value:
    if builtins.isList value then concatStringsSep "" (map (line name) value) else line name value;
  section =
    name: settings:
    if settings == { } then
      ""
    else
      "[${name}]\n${
        concatStringsSep "" (map (setting: lines setting settings.${setting}) (attrNames settings))
      }\n";
  # Deliberately not in the file that both read.
  own = {
    services = [
      "choir-disk"
      "choir-boundary"
      "choir-generations"
    ];
    timers = [ "choir-generations" ];
  };
  text =
    sections: unit:
    concatStringsSep "" (map (it: section it.name (it.of unit)) sections)
    + section "Install" (if unit.wantedBy == [ ] then { } else { WantedBy = unit.wantedBy; });
  unit = {
    name = "Unit";
    of = unit: unit.unitConfig;
  };
  kinds = {
    services = {
      suffix = "service";
      sections = [
        unit
        {
          name = "Service";
          of = unit: unit.serviceConfig;
        }
      ];
    };
    sockets = {
      suffix = "socket";
      sections = [
        unit
        {
          name = "Socket";
          of = unit: unit.socketConfig;
        }
      ];
    };
    timers = {
      suffix = "timer";
      sections = [
        unit
        {
          name = "Timer";
          of = unit: unit.timerConfig;
        }
      ];
    };
  };
  ofKind =
    directory: units: which:
    map (name: {
      name = "${directory}/${name}.${kinds.${which}.suffix}";
      value = text kinds.${which}.sections units.${which}.${name};
    }) (builtins.filter (name: !builtins.elem name (own.${which} or [ ])) (attrNames units.${which}));
  mounts = map (mount: {
    name = "system/var-lib-choir-volumes.mount";
    value =
      section "Unit" mount.unitConfig
      + section "Mount" {
        Options = mount.options;
        Type = mount.type;
        What = mount.what;
        Where = mount.where;
      };
  }) plain.systemd.mounts;
in
{
  units = builtins.listToAttrs (
    builtins.concatMap (ofKind "system" plain.systemd) [
      "services"
      "sockets"
      "timers"
    ]
    ++ builtins.concatMap (ofKind "user" plain.systemd.user) [
      "services"
      "sockets"
    ]
    ++ mounts
  );
  inherit
    (import ../module/places.nix {
      config = plain;
      inherit lib;
      pkgs = evaluated.packages;
    })
    places
    ;
  tmpfiles = plain.systemd.tmpfiles.rules;
  settings = builtins.fromJSON (
    builtins.head (
      builtins.match ".*--config ([{].*[}]) check-config.*"
        config.environment.etc."choir/hypervisor.toml".source.script
    )
  );
}
