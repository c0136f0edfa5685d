#!/bin/bash
# Fetch Debian's cloud kernel and unpack (not install) what a small guest needs.
# Usage: fetch-kernel.sh DIRECTORY   ->  DIRECTORY/vmlinuz-VERSION, DIRECTORY/modules/*.ko
# A directory that is complete is left alone, so a repeat needs no network.
set -euo pipefail
directory=${1:?usage: fetch-kernel.sh DIRECTORY}
# Not in load order: make_initramfs.py knows that.
modules=(virtio virtio_ring virtio_pci virtio_pci_modern_dev virtio_pci_legacy_dev virtio_blk
  virtio_net net_failover failover virtio_balloon button evdev)

[ -e "$directory/complete" ] && exit 0
command -v apt-get >/dev/null || {
  echo "this needs apt-get; elsewhere put a vmlinuz-VERSION and modules/*.ko into $directory" >&2
  exit 1
}
mkdir -p "$directory"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The name that people install is a metapackage; its dependency is the kernel.
real() {
  { apt-cache depends linux-image-cloud-amd64 2>/dev/null || true; } |
    awk '$1 == "Depends:" && $2 ~ /^linux-image-/ {print $2; exit}'
}
fetch() {
  local package
  package=$(real)
  [ -n "$package" ] || return 1
  (cd "$scratch" && apt-get -q -o APT::Sandbox::User=root download "$package")
}
fetch 2>/dev/null || { apt-get -q update; fetch; }

archive=$(echo "$scratch"/linux-image-*.deb)
dpkg-deb --fsys-tarfile "$archive" | tar -x -C "$scratch" --wildcards './boot/vmlinuz-*' './lib/modules/*'
kernel=$(echo "$scratch"/boot/vmlinuz-*)
mkdir -p "$directory/modules"
for module in "${modules[@]}"; do
  found=$(find "$scratch/lib/modules" -name "$module.ko" -print -quit)
  # What is not a module is part of the kernel.
  if [ -n "$found" ]; then cp "$found" "$directory/modules/"; fi
done
rm -f "$directory"/vmlinuz-*
cp "$kernel" "$directory/"
chmod 0644 "$directory"/vmlinuz-* "$directory"/modules/*
touch "$directory/complete"
echo "${kernel##*/} and $(find "$directory/modules" -name '*.ko' | wc -l) modules in $directory"
