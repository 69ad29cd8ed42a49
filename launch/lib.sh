# shellcheck shell=bash
# What the scripts share; sourced, not run.

LAUNCH=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/versions.env
source "$LAUNCH/versions.env"

dry_run=false PASSED=()

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The head comment of the calling script.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
}

# Words as one line that a shell reads back as the same words; quoted where they need it.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s' "${line:1}"
}

# Run a command; with --dry-run, print it instead.
run() {
  if $dry_run; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Flags of xla_flags.env for a platform, on one line.
flags_for() {
  awk -v platform="$1" '$1 == platform || ($1 == "tpu" && platform ~ /^v/) { printf "%s%s", sep, $2; sep = " " }' \
    "$LAUNCH/xla_flags.env"
}

# v5e, v5p or v6e of a slice like v5p-64.
generation() {
  case $1 in
    v5e-* | v5litepod-*) echo v5e ;;
    v5p-*) echo v5p ;;
    v6e-*) echo v6e ;;
    *) die "slice $1 is not known: v5e-N, v5p-N or v6e-N" ;;
  esac
}

# Name of a run that Google's and Kubernetes' names allow.
check_name() {
  [[ $1 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "name $(quoted "$1"): lower-case letters, digits and dashes, 40 at most, beginning with a letter"
}

need() {
  [[ -n $2 ]] || die "$1 is needed; see --help"
}

# Read options into the variables of their names, which hold the defaults: one that is false is a switch, an array takes
# as many as are given. $1 names the options that there are; what follows -- is left in PASSED.
read_options() {
  local OPTIONS=" $1 dry_run " VARIABLE
  shift
  while (($#)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --) PASSED=("${@:2}") && return ;;
    esac
    VARIABLE=${1#--} VARIABLE=${VARIABLE//-/_}
    [[ $1 =~ ^--[a-z-]+$ && $OPTIONS == *" $VARIABLE "* ]] || die "$(quoted "$1") is not known; see --help"
    if [[ ${!VARIABLE-} == false ]]; then
      printf -v "$VARIABLE" true
    else
      (($# > 1)) || die "$(quoted "$1") is not known, or lacks its value"
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

# Also because arithmetic in a shell runs what it finds in a word.
check_number() {
  [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die "$1 $(quoted "$2"): a whole number, at least 1"
}

# The command of every process: growth and training where the file has a section \`train\`, else training alone.
# $1: configuration; what was PASSED is passed on. The words are left in COMMAND.
make_command() {
  local file=$1
  [[ -f $file ]] || die "config $(quoted "$file"): there is no such file"
  if grep -q '^train:' "$file"; then
    # shellcheck disable=SC2034  # the scripts that source this use it
    COMMAND=(python -m tli_jax.upscale --config "$file" --train.distributed "${PASSED[@]}")
  else
    # shellcheck disable=SC2034
    COMMAND=(python -m tli_jax.train --config "$file" --distributed "${PASSED[@]}")
  fi
}
