#!/bin/sh
# Start Redis with the one user of users.acl, whose password comes from REDIS_PASSWORD.
# Only the password's hash is written, to a directory in memory; further arguments go to redis-server.
set -eu
if [ "${#REDIS_PASSWORD}" -lt 16 ]; then
  echo "REDIS_PASSWORD must have at least 16 characters" >&2
  exit 1
fi
files=${AEGIS_REDIS_FILES:-/etc/aegis}
acl=$(mktemp "${TMPDIR:-/tmp}/users.XXXXXX")
hash=$(printf %s "$REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
sed -e '/^#/d' -e "s/PASSWORD_SHA256/$hash/" "$files/users.acl" > "$acl"
exec docker-entrypoint.sh redis-server "$files/redis.conf" --aclfile "$acl" "$@"
