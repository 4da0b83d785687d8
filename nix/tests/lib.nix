# As much of nixpkgs' lib as the module and its tests use, for machines without nixpkgs: its names, its merging of
# definitions, its priorities, its refusals. It must give what the real one gives: with CHOIR_NIXPKGS set the same tests
# run on that.
let
  inherit (builtins)
    all
    any
    attrNames
    concatMap
    elem
    filter
    foldl'
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isString
    length
    listToAttrs
    map
    mapAttrs
    match
    ;

  optional = condition: value: if condition then [ value ] else [ ];
  optionals = condition: values: if condition then values else [ ];
  genAttrs = names: make: mapNamed (name: name) make names;
  mapNamed =
    name: value: list:
    listToAttrs (
      map (item: {
        name = name item;
        value = value item;
      }) list
    );
  filterAttrs = keep: set: removeAttrs set (filter (name: !keep name set.${name}) (attrNames set));
  recursiveUpdate =
    left: right:
    left
    // mapAttrs (
      name: value:
      if left ? ${name} && isAttrs left.${name} && isAttrs value then
        recursiveUpdate left.${name} value
      else
        value
    ) right;
  quote =
    text:
    builtins.replaceStrings
      [
        "\\"
        "."
        "*"
        "+"
        "?"
        "("
        ")"
        "["
        "]"
        "{"
        "}"
        "^"
        "$"
        "|"
      ]
      [
        "\\\\"
        "\\."
        "\\*"
        "\\+"
        "\\?"
        "\\("
        "\\)"
        "\\["
        "]"
        "\\{"
        "}"
        "\\^"
        "\\$"
        "\\|"
      ]
      text;
  hasInfix = part: text: match "(.|\n)*${quote part}(.|\n)*" text != null;
  hasPrefix = part: text: builtins.substring 0 (builtins.stringLength part) text == part;
  hasSuffix =
    part: text:
    let
      length = builtins.stringLength text;
      most = builtins.stringLength part;
    in
    length >= most && builtins.substring (length - most) most text == part;
  escapeShellArg =
    text:
    if match "[[:alnum:],._+:@%/-]+" text != null then
      text
    else
      "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] text}'";

  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkOption = option: option // { _type = "option"; };
  kind = value: if isAttrs value then value._type or null else null;
  isOption = value: kind value == "option";
  shown = builtins.concatStringsSep ".";

  # A definition of a set as sets of definitions: the conditions go to the attributes, so that which attributes there are
  # does not depend on them.
  push =
    definition:
    if kind definition == "if" then
      map (mapAttrs (_: mkIf definition.condition)) (push definition.content)
    else if kind definition == "merge" then
      concatMap push definition.contents
    else if kind definition == "override" then
      map (mapAttrs (_: mkOverride definition.priority)) (push definition.content)
    else
      [ definition ];

  # What one definition says in the end: values with their priorities.
  discharge =
    definition:
    if kind definition == "if" then
      optionals definition.condition (discharge definition.content)
    else if kind definition == "merge" then
      concatMap discharge definition.contents
    else if kind definition == "override" then
      map (said: said // { inherit (definition) priority; }) (discharge definition.content)
    else
      [
        {
          priority = 100;
          value = definition;
        }
      ];

  # The value of something of a type: of its definitions those of the strongest priority count.
  merged =
    path: type: definitions:
    let
      said = concatMap discharge definitions;
      strongest = foldl' (least: it: if it.priority < least then it.priority else least) 9999 said;
      values = map (it: it.value) (filter (it: it.priority == strongest) said);
    in
    if said == [ ] then
      throw "The option `${shown path}' was accessed but has no value defined."
    else if !all type.check values then
      throw "A definition for option `${shown path}' is not of type `${type.name}'."
    else
      type.merge path values;

  mergedOption =
    path: option: definitions:
    merged path option.type (
      definitions ++ optional (option ? default) (mkOverride 1500 option.default)
    );

  same =
    path: values:
    if all (value: value == head values) values then
      head values
    else
      throw "The option `${shown path}' has conflicting definition values.";
  simple = name: check: {
    inherit name check;
    merge = same;
  };
  number = value: isInt value || builtins.isFloat value;
  between =
    low: high:
    simple "integer between ${toString low} and ${toString high}" (
      value: isInt value && low <= value && value <= high
    );
  types = {
    bool = simple "boolean" isBool;
    str = simple "string" isString;
    lines = {
      name = "strings concatenated with a line break";
      check = isString;
      merge = _: builtins.concatStringsSep "\n";
    };
    number = simple "number" number;
    package = simple "package" (value: isAttrs value && value.type or null == "derivation");
    enum = values: simple "one of ${builtins.toJSON values}" (value: elem value values);
    strMatching =
      pattern: simple "string matching ${pattern}" (value: isString value && match pattern value != null);
    # Only as it is used here.
    pathWith =
      { absolute, inStore }:
      assert absolute && !inStore;
      simple "absolute path, not in the Nix store" (
        value:
        (isString value || builtins.isPath value)
        && hasPrefix "/" (toString value)
        && !hasPrefix "/nix/store/" (toString value)
      );
    ints = {
      inherit between;
      unsigned = simple "unsigned integer" (value: isInt value && value >= 0);
      positive = simple "positive integer" (value: isInt value && value > 0);
    };
    nullOr = type: {
      name = "null or ${type.name}";
      check = value: value == null || type.check value;
      merge =
        path: values:
        if all (value: value == null) values then
          null
        else if any (value: value == null) values then
          throw "The option `${shown path}' is defined both null and not null."
        else
          type.merge path values;
    };
    either = left: right: {
      name = "${left.name} or ${right.name}";
      check = value: left.check value || right.check value;
      merge =
        path: values: if all left.check values then left.merge path values else right.merge path values;
    };
    listOf = type: {
      name = "list of ${type.name}";
      check = isList;
      merge = path: values: map (value: merged path type [ value ]) (builtins.concatLists values);
    };
    attrsOf = type: {
      name = "attribute set of ${type.name}";
      check = isAttrs;
      merge =
        path: values:
        let
          sets = concatMap push values;
          of = name: concatMap (set: optional (set ? ${name}) set.${name}) sets;
          names = attrNames (foldl' (found: set: found // set) { } sets);
          present = filter (name: concatMap discharge (of name) != [ ]) names;
        in
        genAttrs present (name: merged (path ++ [ name ]) type (of name));
    };
    submodule = module: {
      name = "submodule";
      check = isAttrs;
      merge =
        path: values: (evaluated path ([ module ] ++ map (config: { inherit config; }) values) { }).config;
    };
  };

  # All modules that these import, each as imports, options and config.
  collected =
    arguments:
    concatMap (
      given:
      let
        opened = if isFunction given || isAttrs given then given else import given;
        module = if isFunction opened then opened arguments else opened;
        isFull = module ? options || module ? config;
      in
      [
        {
          options = module.options or { };
          config = if isFull then module.config or { } else removeAttrs module [ "imports" ];
        }
      ]
      ++ collected arguments (module.imports or [ ])
    );

  joined =
    path: sets:
    let
      names = attrNames (foldl' (found: set: found // set) { } sets);
      one =
        name:
        let
          found = concatMap (set: optional (set ? ${name}) set.${name}) sets;
        in
        if !any isOption found then
          joined (path ++ [ name ]) found
        else if length found == 1 then
          head found
        else
          throw "The option `${shown (path ++ [ name ])}' is already declared.";
    in
    genAttrs names one;

  valued =
    path: options: definitions:
    let
      of = name: concatMap (set: optional (set ? ${name}) set.${name}) definitions;
      one =
        name: option:
        if isOption option then
          mergedOption (path ++ [ name ]) option (of name)
        else
          valued (path ++ [ name ]) option (concatMap push (of name));
      defined = attrNames (foldl' (found: set: found // set) { } definitions);
      unknown = filter (name: !(options ? ${name})) defined;
    in
    if unknown == [ ] then
      mapAttrs one options
    else
      throw "The option `${shown (path ++ [ (head unknown) ])}' does not exist.";

  evaluated =
    path: modules: specialArgs:
    let
      arguments = specialArgs // {
        inherit lib config options;
      };
      found = collected arguments modules;
      options = joined path (map (module: module.options) found);
      config = valued path options (concatMap (module: push module.config) found);
    in
    {
      inherit config options;
    };

  lib = {
    inherit
      any
      escapeShellArg
      filterAttrs
      foldl'
      genAttrs
      hasInfix
      hasPrefix
      hasSuffix
      mkIf
      mkMerge
      mkOption
      mkOverride
      optional
      optionals
      recursiveUpdate
      types
      ;
    escapeShellArgs = list: builtins.concatStringsSep " " (map escapeShellArg list);
    makeBinPath = packages: builtins.concatStringsSep ":" (map (package: "${package}/bin") packages);
    mapAttrsToList = make: set: map (name: make name set.${name}) (attrNames set);
    mkDefault = mkOverride 1000;
    mkForce = mkOverride 50;
    mkEnableOption =
      what:
      mkOption {
        type = types.bool;
        default = false;
        description = "Whether to enable ${what}.";
      };
    optionalAttrs = condition: set: if condition then set else { };
    optionalString = condition: text: if condition then text else "";
    evalModules =
      {
        modules,
        specialArgs ? { },
      }:
      evaluated [ ] modules specialArgs;
  };
in
lib
