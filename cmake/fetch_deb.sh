#!/bin/sh
# Downloads one package of this machine's own Debian or Ubuntu mirrors and unpacks it; needs no root, installs nothing.
# usage: fetch_deb.sh PACKAGE DESTINATION [minimum-version]
# Tries the package lists that are there, then fresh lists of this release, then those of newer releases, all in
# a directory of its own. Signatures are checked with the machine's own keyrings.
set -eu
package=$1
destination=$2
minimum=${3:-0}

for tool in apt-get apt-cache dpkg awk; do
  command -v "$tool" >/dev/null || { echo "fetch_deb: no $tool on this machine" >&2; exit 1; }
done
. /etc/os-release
case "${ID:-}" in
  debian) newer="trixie stable testing" ;;
  ubuntu) newer="resolute questing devel" ;;
  *) echo "fetch_deb: neither Debian nor Ubuntu" >&2; exit 1 ;;
esac

mkdir -p "$destination"
destination=$(cd "$destination" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/deb"

# Prints this machine's sources of its own release with the suite replaced by $1.
sources_for() {
  set -- "$1" /etc/apt/sources.list /etc/apt/sources.list.d/*.list
  suite=$1
  shift
  for file in "$@"; do
    [ -r "$file" ] || continue
    awk -v old="$VERSION_CODENAME" -v new="$suite" '
      $1 == "deb" {
        i = 2
        if ($2 ~ /^\[/) { while ($i !~ /\]$/) i++; i++ }
        if ($(i + 1) != old) next
        $(i + 1) = new
        print
      }' "$file"
  done >"$work/$suite.list"
  for file in /etc/apt/sources.list.d/*.sources; do
    [ -r "$file" ] || continue
    awk -v old="$VERSION_CODENAME" -v new="$suite" '
      BEGIN { RS = ""; FS = "\n" }
      {
        keep = 0; disabled = 0; text = ""; signed = 0
        for (i = 1; i <= NF; i++) {
          line = $i
          if (line ~ /^#/) continue
          if (line ~ /^Enabled:[ ]*(no|false)/) disabled = 1
          if (line ~ /^Types:/) line = "Types: deb"
          if (line ~ /^Suites:/) {
            n = split(substr(line, 8), suites, /[ \t]+/)
            for (j = 1; j <= n; j++) if (suites[j] == old) keep = 1
            line = "Suites: " new
          }
          text = text line "\n"
        }
        if (keep && !disabled) printf "%s\n", text
      }' "$file"
  done >"$work/$suite.sources"
}

# The machine's apt with lists, cache and sources of our own.
own_apt() {
  tool=$1
  suite=$2
  shift 2
  "$tool" -q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$work/parts-$suite" \
    -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o Dir::Cache::pkgcache= \
    -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root -o Acquire::Languages=none \
    -o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 "$@"
}

unpack() {
  for deb in "$work"/deb/"$package"_*.deb; do
    [ -f "$deb" ] || return 1
    version=$(dpkg-deb -f "$deb" Version)
    if dpkg --compare-versions "$version" lt "$minimum"; then
      echo "fetch_deb: $package $version is older than $minimum" >&2
      rm -f "$deb"
      return 1
    fi
    dpkg -x "$deb" "$destination"
    echo "fetch_deb: unpacked $package $version from $1"
  done
}

cd "$work/deb"
if apt-get -q -o APT::Sandbox::User=root download "$package" >"$work/log" 2>&1 && unpack "this machine's package lists"; then
  exit 0
fi
for suite in "$VERSION_CODENAME" $newer; do
  sources_for "$suite"
  mkdir -p "$work/parts-$suite"
  [ ! -s "$work/$suite.list" ] || cp "$work/$suite.list" "$work/parts-$suite/"
  [ ! -s "$work/$suite.sources" ] || cp "$work/$suite.sources" "$work/parts-$suite/"
  own_apt apt-get "$suite" update >>"$work/log" 2>&1 || true
  if own_apt apt-get "$suite" download "$package" >>"$work/log" 2>&1 && unpack "suite $suite"; then
    exit 0
  fi
done
echo "fetch_deb: $package was found in none of: $VERSION_CODENAME $newer" >&2
tail -n 15 "$work/log" >&2
exit 1
