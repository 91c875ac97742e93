#!/bin/sh
# Upgrades the services of docker-compose.yml one after the other, to the version that is checked out and that
# POCL_VERSION in .env names:
#   git pull && deploy/upgrade.sh
# The migration only adds, so that processes of the version before go on meanwhile. Then every service of an image of ours is
# made anew, and the next one not before it is healthy: the APIs, the schedulers, the workers. A worker saves the state of its
# job, which goes on elsewhere or on the new one. It stops at the first failure, and may be run again. Once nothing of the old
# version runs, on any machine: docker compose run --rm migrate python -m api migrate --contract
set -eu
cd "$(dirname "$0")/.."
services=$(docker compose config --services | sort)
named() { echo "$services" | grep -E "^$1(-.*)?\$" || true; }
# shellcheck disable=SC2046 # The names of services have no spaces.
docker compose build migrate $(named worker)
docker compose run --rm migrate
for service in $(named api) $(named scheduler) $(named worker); do
  echo "upgrading $service"
  docker compose up --detach --no-deps --wait "$service"
done
