# shellcheck shell=bash
# What the scripts share; sourced, not run.

LAUNCH=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/versions.env
source "$LAUNCH/versions.env"

DRY_RUN=false

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
  if $DRY_RUN; then
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

# Before an option is read: all but these are followed by a value.
check_option() {
  [[ $1 =~ ^(--dry-run|--spot|--help|-h|--)$ ]] || (($# > 1)) || die "$(quoted "$1") is not known, or lacks its value"
}

# Also because arithmetic in a shell runs what it finds in a word.
check_number() {
  [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || die "$1 $(quoted "$2"): a whole number, at least 1"
}

# The command of every process: growth and training where the file has a section \`train\`, else training alone.
# $1: configuration; the rest is passed on. The words are left in COMMAND.
make_command() {
  local file=$1
  shift
  [[ -f $file ]] || die "config $(quoted "$file"): there is no such file"
  if grep -q '^train:' "$file"; then
    # shellcheck disable=SC2034  # the scripts that source this use it
    COMMAND=(python -m tli_jax.upscale --config "$file" --train.distributed "$@")
  else
    # shellcheck disable=SC2034
    COMMAND=(python -m tli_jax.train --config "$file" --distributed "$@")
  fi
}
