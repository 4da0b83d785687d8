# What nixpkgs calls each line of sandbox/image/packages.txt, so that both images hold the same tools. Empty where such a
# system has no use for it. A test compares the lines.
{
  apt = [ "nix" ];
  apt-utils = [ ];
  bash = [
    "bashInteractive"
    "coreutils"
    "diffutils"
    "findutils"
    "gawk"
    "gnugrep"
    "gnused"
    "gnutar"
    "gzip"
    "hostname"
    "util-linux"
    "which"
  ];
  bash-completion = [ "bash-completion" ];
  ca-certificates = [ "cacert" ];
  file = [ "file" ];
  gnupg = [ "gnupg" ];
  iproute2 = [ "iproute2" ];
  less = [ "less" ];
  lsof = [ "lsof" ];
  netbase = [ "iana-etc" ];
  procps = [ "procps" ];
  psmisc = [ "psmisc" ];
  strace = [ "strace" ];
  tzdata = [ "tzdata" ];

  curl = [ "curl" ];
  fd-find = [ "fd" ];
  gh = [ "gh" ];
  git = [ "git" ];
  git-lfs = [ "git-lfs" ];
  jq = [ "jq" ];
  make = [ "gnumake" ];
  nano = [ "nano" ];
  openssh-client = [ "openssh" ];
  patch = [ "gnupatch" ];
  ripgrep = [ "ripgrep" ];
  rsync = [ "rsync" ];
  tmux = [ "tmux" ];
  unzip = [ "unzip" ];
  vim = [ "vim" ];
  wget = [ "wget" ];
  xz-utils = [ "xz" ];
  zip = [ "zip" ];

  build-essential = [
    "binutils"
    "gcc"
    "gnumake"
  ];
  "cargo-web | cargo" = [ "cargo" ];
  libssl-dev = [ "openssl.dev" ];
  nodejs = [ "nodejs" ];
  # Comes with nodejs.
  npm = [ ];
  pkg-config = [ "pkg-config" ];
  # Its own python is python3.
  python-is-python3 = [ ];
  python3 = [ "python3" ];
  python3-dev = [ ];
  python3-pip = [ "python3Packages.pip" ];
  # A module of python3.
  python3-venv = [ ];
  "rustc-web | rustc" = [ "rustc" ];

  postgresql = [ "postgresql" ];
  redis-server = [ "redis" ];
  sqlite3 = [ "sqlite" ];
}
