# The parts of an origin: { scheme, name, port }, port being null where it is not said. Null for what is no origin.
origin:
let
  parts = builtins.match "(https?)://([a-z0-9.-]+)(:([0-9]+))?/?" origin;
  at = builtins.elemAt parts;
in
if parts == null then
  null
else
  {
    scheme = at 0;
    name = at 1;
    port = at 3;
  }
