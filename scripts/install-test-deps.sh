#!/usr/bin/env bash
# Installs the programs that the tests and the demo call, if they are missing. Debian and Ubuntu;
# elsewhere it names what is missing.
set -euo pipefail

# program:package
want=(
  make:make
  gcc:gcc # the race detector needs it
  restic:restic
  borg:borgbackup
  mkfs.btrfs:btrfs-progs
  mkfs.xfs:xfsprogs
  mkfs.ext4:e2fsprogs
  losetup:mount
  tar:tar
  zstd:zstd
  python3:python3 # the recipe in each snapshot is tried
  dockerd:docker.io
  dbus-daemon:dbus
  busybox:busybox-static # must be static
  ps:procps
  blkid:util-linux
  zfs-fuse:zfs-fuse # views on a real ZFS
  fusermount:fuse3 # mount of snapshots by any user
  rclone:rclone
  sshd:openssh-server
  ssh:openssh-client
)
# Programs that are Go modules: name package@version
modules=(
  "versitygw github.com/versity/versitygw/cmd/versitygw@v1.8.0" # an S3 server
)
PATH=$PATH:/usr/sbin:/sbin
missing=()
for w in "${want[@]}"; do
  command -v "${w%%:*}" >/dev/null || missing+=("${w#*:}")
done
# gcc comes without the C library's headers where recommended packages are left out.
[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)

# Go puts them where the tests look: in GOBIN, or bin below GOPATH.
bin=$(go env GOBIN)
bin=${bin:-$(go env GOPATH)/bin}
for m in "${modules[@]}"; do
  command -v "${m%% *}" >/dev/null || [ -x "$bin/${m%% *}" ] || go install "${m#* }"
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "error: missing: ${missing[*]}" >&2
  echo "hint:  Install these packages, or what your system calls them, and try again." >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || {
    echo "error: cannot install ${missing[*]}: neither root nor sudo" >&2
    exit 1
  }
  as_root=(sudo)
fi
echo "installing ${missing[*]}"
# The programs are wanted, not their services: a daemon that runs would be in the tests' way.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 0755 "$policy"
fi
"${as_root[@]}" apt-get -q update
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install "${missing[@]}"
