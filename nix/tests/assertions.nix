# Every assertion of the module: a configuration at which it fires alone, and one beside it at which none does.
let
  choir = value: { services.choir = value; };
  at = origin: domain: {
    settings.control.origin = origin;
    settings.sandboxes.domain = domain;
    settings.listen.trusted_proxies = [ "192.0.2.7/32" ];
  };
  served = at "https://choir.example.com" "choir-apps.example";
  public = served // {
    tls = {
      mode = "public";
      email = "ops@example.com";
      dnsProvider = "route53";
      environmentFile = "/etc/choir/dns";
    };
  };
  without = name: public // { tls = removeAttrs public.tls [ name ]; };
  token = "/etc/choir/operator-token";
  recipient = "age1praw4k9u5wx2cptum38elepzv6kfjk8dsu4f8dltvcd5mrefl5ssjzamw0";
  ids = start: count: {
    users.users.other.subUidRanges = [
      {
        startUid = start;
        inherit count;
      }
    ];
  };
  case = name: says: wrong: right: {
    inherit
      name
      says
      wrong
      right
      ;
  };
  own =
    name: says: wrong: right:
    case name says (choir wrong) (choir right);
in
[
  (own "an origin with a path is refused" "must look like"
    (at "https://choir.example.com/x" "choir-apps.example")
    served
  )
  (own "an origin at an address is refused" "not an IP address"
    (at "https://192.0.2.1" "choir-apps.example")
    served
  )
  (own "http is for localhost only" "must be https"
    (at "http://choir.example.com" "choir-apps.example")
    { }
  )
  (own "a sandbox domain that is an address is refused" "the name of a host"
    (at "https://choir.example.com" "192.0.2.1")
    served
  )
  (own "the control host is no sandbox domain" "is the control host itself"
    (at "https://choir.example.com" "choir.example.com")
    served
  )
  (own "sandboxes are not below the control host" "is below the control host"
    (at "https://choir.example.com" "apps.choir.example.com")
    (at "https://choir.example.com" "apps-choir.example.com")
  )
  (own "the control host is not below the sandboxes" "is below settings.sandboxes.domain"
    (at "https://choir.example.com" "example.com")
    (at "https://choir.example.com" "xample.com")
  )
  (own "the relying party is the control host" "rp_id"
    (
      served
      // {
        settings = served.settings // {
          control = served.settings.control // {
            rp_id = "example.com";
          };
        };
      }
    )
    (
      served
      // {
        settings = served.settings // {
          control = served.settings.control // {
            rp_id = "choir.example.com";
          };
        };
      }
    )
  )
  (own "without an image there must be an archive" "default_image" { image = null; } {
    image = null;
    settings.sandboxes.default_image = "/srv/own.tar";
  })
  (own "a credential is named plainly" "secrets.required" { secrets.required."a b" = "/run/keys/a"; }
    {
      secrets.required.a_b = "/run/keys/a";
    }
  )
  (own "the key of a provider is a credential" "the key `openai`"
    { settings.providers.openai.key = "openai"; }
    {
      settings.providers.openai.key = "openai";
      settings.providers.anthropic.key = "secrets_anthropic";
      secrets.required.openai = "/run/keys/openai";
    }
  )
  (own "a backup is for somebody" "backup.recipients" { backup.enable = true; } {
    backup.enable = true;
    settings.backup.recipients = [ recipient ];
  })
  (own "the drill needs a token" "drill.enable" { drill.enable = true; } {
    drill.enable = true;
    operatorTokenFile = token;
  })
  (own "the doctor needs a token" "doctor.enable" { doctor.enable = true; } {
    doctor.enable = true;
    operatorTokenFile = token;
  })
  (own "an alert has a program" "alert.command" { alert.command = [ ]; } {
    alert.command = [ "/bin/true" ];
  })
  (own "Caddy is at port 443" "no port" (
    public // { settings = (at "https://choir.example.com:8443" "choir-apps.example").settings; }
  ) public)
  (own "the authority has somebody to write to" "tls.email" (without "email") public)
  (own "a certificate for all hosts is had by DNS" "tls.dnsProvider" (without "dnsProvider") public)
  (own "who speaks TLS before us is named" "trusted_proxies" (
    served // { settings = removeAttrs served.settings [ "listen" ]; }
  ) served)
  (own "nothing is opened where nothing listens" "openFirewall" (served // { openFirewall = true; }) (
    public // { openFirewall = true; }
  ))
  (case "the ids of sandboxes are nobody else's" "users.users.other" (ids 7553599 1) (
    ids 7553600 65536
  ))
  (case "port 9090 is ours" "Prometheus" { services.prometheus.enable = true; } {
    services.prometheus.enable = true;
    services.prometheus.port = 9091;
  })
  (case "generations do not end by age" "by age" {
    nix.gc.automatic = true;
    nix.gc.options = "--delete-older-than 14d";
  } { nix.gc.automatic = true; })
]
