# shellcheck shell=bash
# Functions shared by the launch scripts, which source this file.

LAUNCH=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/versions.env
source "$LAUNCH/versions.env"

dry_run=false PASSED=()

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Print the head comment of the calling script.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
}

# Print words as one line that a shell parses back into the same words.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s' "${line:1}"
}

# Run a command, or print it with --dry-run.
run() {
  if $dry_run; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Print the TPU generation of a slice: v5p for v5p-64.
generation() {
  case $1 in
    v5e-* | v5litepod-*) echo v5e ;;
    v5p-*) echo v5p ;;
    v6e-*) echo v6e ;;
    *) die "slice $1: unknown, use v5e-N, v5p-N or v6e-N" ;;
  esac
}

# Check that a run's name is valid for both Google Cloud and Kubernetes.
check_name() {
  [[ $1 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "name $(quoted "$1"): use a letter followed by at most 39 lower-case letters, digits and dashes"
}

need() {
  [[ -n $2 ]] || die "$1 is required; see --help"
}

# Parse options into variables of the same names. The caller sets the defaults: `false` makes a switch, an array makes
# an option that can be repeated. $1 lists the option names. Arguments after -- go into PASSED.
read_options() {
  local OPTIONS=" $1 dry_run " VARIABLE
  shift
  while (($#)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --) PASSED=("${@:2}") && return ;;
    esac
    VARIABLE=${1#--} VARIABLE=${VARIABLE//-/_}
    [[ $1 =~ ^--[a-z-]+$ && $OPTIONS == *" $VARIABLE "* ]] || die "$(quoted "$1"): unknown option; see --help"
    if [[ ${!VARIABLE-} == false ]]; then
      printf -v "$VARIABLE" true
    else
      (($# > 1)) || die "$(quoted "$1"): unknown option, or its value is missing"
      if [[ $(declare -p "$VARIABLE") == 'declare -a'* ]]; then
        local -n ARRAY=$VARIABLE
        ARRAY+=("$2")
      else
        printf -v "$VARIABLE" '%s' "$2"
      fi
      shift
    fi
    shift
  done
}

# Check that an option is a positive integer: arithmetic in a shell would execute code inside a value.
check_number() {
  [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die "$1 $(quoted "$2"): must be an integer from 1 to 99999"
}

# Set COMMAND to the command of every process: growth and training if the configuration $1 has a `train` section,
# training alone otherwise. The arguments in PASSED are appended.
make_command() {
  local file=$1
  [[ -f $file ]] || die "config $(quoted "$file"): no such file"
  if grep -q '^train:' "$file"; then
    # shellcheck disable=SC2034  # used by the scripts that source this file
    COMMAND=(python -m tli_jax.upscale --config "$file" --train.distributed "${PASSED[@]}")
  else
    # shellcheck disable=SC2034
    COMMAND=(python -m tli_jax.train --config "$file" --distributed "${PASSED[@]}")
  fi
}
