#!/usr/bin/env bash
# Collects the wheels that tools/gpu_day_one.sh installs on a machine without a network: those of
# tools/gpu_day_one/wheels.txt, for Python 3.12 on x86-64 Linux, less than 60 MiB together.
#
#   tools/pack_gpu_wheels.sh [FOLDER]      default: gpu_wheels
#
# Safe to call again: wheels that are there are kept, those of other versions are removed.
#
#   PYTHON=...  an interpreter with pip (default: python3); it need not be a 3.12
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
list=$root/tools/gpu_day_one/wheels.txt
most_mib=60

fail() {
  printf 'pack_gpu_wheels: %s\n' "$*" >&2
  exit 1
}
case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
-*) fail "unknown argument '$1'; see --help" ;;
esac
folder=${1:-$root/gpu_wheels}
python=${PYTHON:-python3}
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip; name another interpreter: PYTHON=/path/to/python3"
mkdir -p "$folder"

# A wheel's name begins NAME-VERSION-, the name's dots and dashes as underscores, in any case.
missing=() kept=()
shopt -s nocasematch nullglob
while read -r pin; do
  name=${pin%%==*} version=${pin##*==}
  name=${name//[-.]/_}
  found=
  for wheel in "$folder"/*.whl; do
    file=$(basename "$wheel")
    if [[ ${file%%-*} == "$name" && $file == *"-$version-"* ]]; then
      found=$wheel
      break
    fi
  done
  if [ -n "$found" ]; then kept+=("$found"); else missing+=("$pin"); fi
done < <(grep -v '^ *\(#\|$\)' "$list")
for wheel in "$folder"/*.whl; do
  case " ${kept[*]-} " in
  *" $wheel "*) ;;
  *) rm -f -- "$wheel" ;;
  esac
done

if [ ${#missing[@]} -gt 0 ]; then
  printf 'pack_gpu_wheels: %d wheels are there, fetching %d\n' ${#kept[@]} ${#missing[@]}
  # pip takes a platform word for word, so every glibc that a wheel may be built for is named.
  platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
  for minor in 39 35 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  fresh=$(mktemp -d "$folder/.fresh.XXXXXX")
  trap 'rm -rf -- "$fresh"' EXIT
  # A few at a time: what one call has fetched is kept when a later one fails.
  for ((first = 0; first < ${#missing[@]}; first += 8)); do
    pins=("${missing[@]:first:8}")
    if ! "$python" -m pip download --quiet --disable-pip-version-check --no-input --no-deps --only-binary=:all: \
      --implementation cp --python-version 3.12 "${platforms[@]}" --dest "$fresh" "${pins[@]}" 2>"$fresh/log"; then
      grep -v ^WARNING "$fresh/log" | tail -n 5 >&2
      fail "not fetched: ${pins[*]}
  Is there a package index (pip config list)? What was fetched before is in $folder; call again to go on."
    fi
    mv -- "$fresh"/*.whl "$folder"
  done
fi

bytes=$(cat "$folder"/*.whl | wc -c)
count=$(find "$folder" -maxdepth 1 -name '*.whl' | wc -l)
mib=$(((bytes + 1048575) / 1048576))
[ "$mib" -lt "$most_mib" ] || fail "$folder has $count wheels of $mib MiB together, and less than $most_mib MiB must be carried: shorten $list"
printf 'pack_gpu_wheels: %s: %d wheels, %d MiB (limit %d)\n' "$folder" "$count" "$mib" "$most_mib"
