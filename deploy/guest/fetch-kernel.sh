#!/bin/bash
# Fetch the distribution's kernel and unpack (not install) what a small guest needs: Debian's
# cloud kernel, or Fedora's kernel-core with kernel-modules-core.
# Usage: fetch-kernel.sh DIRECTORY   ->  DIRECTORY/vmlinuz-VERSION, DIRECTORY/modules/*.ko
# A directory that is complete is left alone, so a repeat needs no network.
set -euo pipefail
directory=${1:?usage: fetch-kernel.sh DIRECTORY}
# Not in load order: make_initramfs.py knows that.
modules=(virtio virtio_ring virtio_pci virtio_pci_modern_dev virtio_pci_legacy_dev virtio_blk
  virtio_net net_failover failover virtio_balloon button evdev)

[ -e "$directory/complete" ] && exit 0
mkdir -p "$directory/modules"
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
unpack_debian() {
  fetch 2>/dev/null || { apt-get -q update; fetch; }
  dpkg-deb --fsys-tarfile "$(echo "$scratch"/linux-image-*.deb)" |
    tar -x -C "$scratch" --wildcards './boot/vmlinuz-*' './lib/modules/*'
  kernel=$(echo "$scratch"/boot/vmlinuz-*)
  name=${kernel##*/}
}
unpack_fedora() {
  dnf -q download --arch x86_64 --destdir "$scratch" kernel-core kernel-modules-core
  for archive in "$scratch"/*.rpm; do
    rpm2cpio "$archive" | (cd "$scratch" && cpio -idm --quiet)
  done
  kernel=$(find "$scratch" -path '*/modules/*/vmlinuz' -print -quit)
  name=vmlinuz-$(basename "$(dirname "$kernel")")
}
plain() {
  case "$1" in
    *.xz) xz -dc "$1" ;;
    *.zst) zstd -dcq "$1" ;;
    *.gz) gzip -dc "$1" ;;
    *) cat "$1" ;;
  esac
}

if command -v apt-get >/dev/null; then
  unpack_debian
elif command -v dnf >/dev/null; then
  unpack_fedora
else
  echo "this needs apt-get or dnf; elsewhere put a vmlinuz-VERSION and modules/*.ko into $directory" >&2
  exit 1
fi

for module in "${modules[@]}"; do
  found=$(find "$scratch" -name "$module.ko*" -print -quit)
  # What is not a module is part of the kernel.
  if [ -n "$found" ]; then plain "$found" > "$directory/modules/$module.ko"; fi
done
rm -f "$directory"/vmlinuz-*
cp "$kernel" "$directory/$name"
chmod 0644 "$directory"/vmlinuz-* "$directory"/modules/*
touch "$directory/complete"
echo "$name and $(find "$directory/modules" -name '*.ko' | wc -l) modules in $directory"
