# What the types of the options refuse, and what is like it and is taken.
let
  choir = value: { services.choir = value; };
  set =
    section: key: value:
    choir { settings.${section}.${key} = value; };
  case = name: wrong: right: { inherit name wrong right; };
in
[
  (case "a key that the configuration file does not have" (set "listen" "colour" [ ]) (
    set "listen" "trusted_proxies" [ ]
  ))
  (case "a section that it does not have" (set "listener" "trusted_proxies" [ ]) { })
  (case "the runtime that isolates nothing" (set "sandboxes" "runtime" "process") (
    set "sandboxes" "oci_runtime" "crun"
  ))
  (case "text for a number" (set "sandboxes" "max_running" "16") (set "sandboxes" "max_running" 16))
  (case "no sandbox at all" (set "sandboxes" "max_running" 0) (set "sandboxes" "max_running" 1))
  (case "a trail that is kept too long to count" (set "audit" "keep_days" 36501) (
    set "audit" "keep_days" 36500
  ))
  (case "a recipient that is no age key" (set "backup" "recipients" [ "ssh-ed25519 AAAA" ]) (
    set "backup" "recipients" [ "age1qqqq" ]
  ))
  (case "a sandbox domain with capitals" (set "sandboxes" "domain" "Apps.example") (
    set "sandboxes" "domain" "apps.example"
  ))
  (case "a way to wake up that there is not" (set "sandboxes" "awake" "never") (
    set "sandboxes" "awake" "always"
  ))
  (case "a provider over http" (choir { settings.providers.llm.upstream = "http://llm.example"; })
    (choir {
      settings.providers.llm.upstream = "https://llm.example";
    })
  )
  (case "a secret in the store, where everybody reads it"
    (choir { secrets.required.a = "/nix/store/00000000000000000000000000000000-a"; })
    (choir {
      secrets.required.a = "/run/keys/a";
    })
  )
  (case "a secret at no certain place" (choir { operatorTokenFile = "token"; }) (choir {
    operatorTokenFile = "/etc/choir/operator-token";
  }))
  (case "one generation, from which nothing leads back" (choir { generations = 1; }) (choir {
    generations = 2;
  }))
  (case "a way to do TLS that there is not" (choir { tls.mode = "acme"; }) (choir {
    tls.mode = "none";
  }))
  (case "a size that is none" (choir { data.fileSize = "much"; }) (choir {
    data.fileSize = "8G";
  }))
  (case "an option that there is not" (choir { port = 9091; }) { })
]
