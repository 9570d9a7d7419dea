#!/usr/bin/env bash
# Fetches the libraries that the run viewer's page is built on, in pinned versions with pinned hashes, into
# megatron_laser/viewer/web/vendor. They are committed: nobody who installs or uses the viewer runs this.
#
#   tools/vendor_viewer.sh           write the folder anew
#   tools/vendor_viewer.sh --check   compare the committed files with what the pinned packages hold
#
# Needs npm and openssl. What is changed: the source-map lines at the ends go, since the maps are not here, and the
# import of "preact" in its hooks names the file beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
  ;;
'' | --check) ;;
*)
  echo "vendor_viewer: unknown argument '$1'; see --help" >&2
  exit 2
  ;;
esac
fail() {
  printf 'vendor_viewer: %s\n' "$*" >&2
  exit 1
}
command -v npm >/dev/null || fail "no npm on PATH"
command -v openssl >/dev/null || fail "no openssl on PATH"

# package version sha512 (the `integrity` of the registry)
packages='
uplot 1.6.32 KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==
preact 11.2.0 /HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==
htm 3.1.1 983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==
temml 0.13.5 aPkDDgunanpLNL0ql32HbolqLep+w8DRcVXRql7rWrMt/PhczdLgL4UBYYVU3BYjCNjkGq4EqwIicu/zWr1iOg==
'
# package, file in it, name here
files='
uplot dist/uPlot.iife.min.js uplot.js
uplot dist/uPlot.min.css uplot.css
uplot LICENSE LICENSE.uplot.txt
preact dist/preact.mjs preact.js
preact hooks/dist/hooks.mjs preact_hooks.js
preact LICENSE LICENSE.preact.txt
htm dist/htm.mjs htm.js
htm LICENSE LICENSE.htm.txt
temml dist/temml.min.js temml.js
temml dist/Temml-Local.css temml.css
temml dist/Temml.woff2 Temml.woff2
temml LICENSE LICENSE.temml.txt
'
web=megatron_laser/viewer/web/vendor
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
new=$work/vendor
mkdir "$new"
{
  echo 'Libraries of the run viewer, fetched by tools/vendor_viewer.sh from the npm registry.'
  echo
} >"$new/VERSIONS.txt"
while read -r package version integrity; do
  [ -n "$package" ] || continue
  (cd "$work" && npm pack --silent "$package@$version" >/dev/null) || fail "npm could not fetch $package $version"
  archive=$work/$package-$version.tgz
  found=$(openssl dgst -sha512 -binary "$archive" | openssl base64 -A)
  [ "$found" = "$integrity" ] || fail "$package $version has the hash $found, not the pinned $integrity"
  mkdir "$work/$package"
  tar -xzf "$archive" -C "$work/$package" --strip-components=1
  echo "$package $version" >>"$new/VERSIONS.txt"
done <<<"$packages"
while read -r package file name; do
  [ -n "$package" ] || continue
  cp "$work/$package/$file" "$new/$name" || fail "$package has no $file"
done <<<"$files"
sed -i '/^\/\/# sourceMappingURL=/d' "$new"/*.js
sed -i 's|from"preact"|from"./preact.js"|' "$new/preact_hooks.js"
grep -q 'from"./preact.js"' "$new/preact_hooks.js" || fail "preact's hooks import preact in another way than expected"
chmod 644 "$new"/*
if [ "${1:-}" = --check ]; then
  diff -r "$new" "$web" && echo "$web is what the pinned packages hold"
else
  rm -rf "$web"
  cp -r "$new" "$web"
  du -b "$web"
fi
