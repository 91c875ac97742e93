#!/bin/sh
# Pins the images of docker-compose.yml and of the Dockerfile to the digests that their tags have now, in .env:
#   deploy/pin-images.sh            and then: docker compose build && docker compose up --detach
# A tag may be moved to another image by whoever owns it; a digest is the image. Needs Docker with buildx, and the network.
set -eu
cd "$(dirname "$0")/.."
[ -f .env ] || { echo "there is no .env: copy .env.example first" >&2; exit 1; }
new=$(mktemp .env.XXXXXX)
trap 'rm -f "$new"' EXIT
chmod 600 "$new"
grep -v '^[A-Z]*_IMAGE=' .env > "$new" || true
# shellcheck disable=SC2013 # No image has a space in its name.
for line in $(grep '^[A-Z]*_IMAGE=' .env.example); do
  name=${line%%=*}
  # A version that .env names counts more than that of the example.
  image=$(sed -n "s/^$name=//p" .env | tail -n 1)
  image=${image:-${line#*=}}
  tag=${image%%@*}
  digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$tag")
  case $digest in
    sha256:????????????????????????????????????????????????????????????????) ;;
    *) echo "no digest of $tag: $digest" >&2; exit 1 ;;
  esac
  echo "$name=$tag@$digest" | tee -a "$new"
done
mv "$new" .env
