#!/usr/bin/env bash
# The newest DIALS beside this machine: a tree of Debian unstable, and the tests that depend on DIALS, MPI, Python or NumPy
# run in it. Root on a Debian machine is needed; the mirror is the one that the machine's own apt uses.
#   newest_dials.sh up             make the tree (about 2 GB, four minutes), or take the one that is there
#   newest_dials.sh in COMMAND...  run a command in it, in the present folder
#   newest_dials.sh test           the tests in it
#   newest_dials.sh down           take its mounts away; then it may be removed with rm -rf --one-file-system
# NEWEST_DIALS names the place of the tree.
set -euo pipefail
tree=$(realpath -m "${NEWEST_DIALS:-/var/tmp/ssx_mpi-newest-dials}")
packages=(dials python3-gemmi python3-mpi4py openmpi-bin python3-venv python3-hdf5plugin gcc libc6-dev make git ca-certificates)
top=$(cd "$(dirname "$0")/.." && pwd -P)
# made first, and ready last: a tree whose making was cut short is made anew
ready=$tree/.ssx_mpi-ready

not_tested() {
  echo "NOT TESTED ON THE NEWEST DIALS: $1"
  exit 0
}

mounted() { mountpoint -q "$tree/$1"; }

mount_all() {
  mkdir -p "$tree"/{proc,sys,dev}
  mounted proc || mount -t proc proc "$tree/proc"
  mounted dev || mount --rbind /dev "$tree/dev"
  mounted sys || mount --rbind /sys "$tree/sys"
}

unmount_all() {
  awk -v t="$tree/" 'index($2, t) == 1 {print $2}' /proc/mounts | sort -r | while read -r place; do
    umount -l "$place" || true
  done
  ! grep -qF " $tree/" /proc/mounts
}

make_tree() {
  command -v debootstrap >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends debootstrap; } >&2
  local mirror
  mirror=$(apt-get indextargets --format '$(SITE)' 'Label: Debian' | head -n 1)
  [ -n "$mirror" ] || { echo "apt knows no Debian mirror" >&2; return 1; }
  unmount_all && rm -rf --one-file-system "$tree"
  mkdir -p "$tree"
  debootstrap --variant=minbase --include=ca-certificates sid "$tree" "$mirror" >&2
  cp /etc/resolv.conf "$tree/etc/resolv.conf" 2>/dev/null || true
  for file in /etc/apt/apt.conf.d/*proxy* /etc/apt/apt.conf.d/99*; do
    [ ! -e "$file" ] || cp "$file" "$tree/etc/apt/apt.conf.d/"
  done
  [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$tree/etc/pip.conf"
  trust
  mount_all
  chroot "$tree" sh -c "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
    --no-install-recommends ${packages[*]}" </dev/null >&2
  touch "$ready"
}

# the certificates that this machine trusts
trust() {
  mkdir -p "$tree/etc/ssl/certs"
  cp /etc/ssl/certs/ca-certificates.crt "$tree/etc/ssl/certs/ca-certificates.crt"
}

up() {
  [ "$(id -u)" = 0 ] || { echo "only root can make a tree" >&2; return 1; }
  command -v apt-get >/dev/null || { echo "there is no apt here" >&2; return 1; }
  [ -e "$ready" ] || make_tree
  trust
  mount_all
}

# the folder above the checkout is mounted, so that data beside it are there too
inside() {
  local here above
  here=$(pwd -P)
  above=$(dirname "$top")
  mount_all
  mkdir -p "$tree$above"
  mounted "${above#/}" || mount --bind "$above" "$tree$above"
  chroot "$tree" /usr/bin/env -i HOME=/root LC_ALL=C.UTF-8 CI="${CI:-}" \
    PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    PRTE_MCA_mapby=:oversubscribe \
    /bin/sh -c 'cd "$1" && shift && exec "$@"' _ "$here" "$@"
}

case ${1:-} in
up)
  up
  ;;
in)
  shift
  inside "$@"
  ;;
test)
  cd "$top"
  log=$(mktemp)
  # a shell of its own: where its failure is handled, a shell does not stop at the first error
  bash "$0" up >"$log" 2>&1 || not_tested "$(tail -n 1 "$log")"
  trap unmount_all EXIT
  inside make setup VENV=.venv-newest </dev/null >"$log" 2>&1 || { tail -n 20 "$log"; exit 1; }
  version=$(inside .venv-newest/bin/python -c \
    'from ssx_mpi import dials_compat as d; print(".".join(map(str, d.dials_version())))' </dev/null)
  echo "== tests on DIALS $version =="
  # what needs a cluster or the machine's own packages was tested outside
  inside .venv-newest/bin/python -m pytest -q -p no:cacheprovider --ignore=tests/cluster --ignore=tests/test_makefile.py \
    --ignore=tests/submission "${@:2}" </dev/null
  echo "== passed on DIALS $version =="
  ;;
down)
  unmount_all
  ;;
*)
  sed -n '2,8s/^# //p' "$0"
  exit 2
  ;;
esac
