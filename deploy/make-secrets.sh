#!/bin/sh
# Makes the secrets of docker-compose.yml, each a file of its own, and keeps those that are there:
#   deploy/make-secrets.sh [DIRECTORY]        (SECRETS_DIRECTORY, and else ./secrets)
# A container sees the files alone, as a user of its own, so they are readable by all; the directory is closed to others.
set -eu
directory=${1:-${SECRETS_DIRECTORY:-secrets}}
umask 077
mkdir -p "$directory"
chmod 700 "$directory"
for name in postgres-password redis-password metrics-token grafana-password; do
  file=$directory/$name
  if [ -s "$file" ]; then
    echo "kept $file"
  else
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$file.new"
    echo >> "$file.new"
    mv "$file.new" "$file"
    echo "made $file"
  fi
  chmod 444 "$file"
done
# Compose labels what it mounts as a volume, but no secret.
if command -v selinuxenabled > /dev/null && selinuxenabled; then
  chcon -R -t container_file_t "$directory"
fi
