#!/bin/bash
# A private certificate authority and one certificate per name, for mutual TLS between coordinator,
# workers and CLI. Run again with more names: the authority and existing certificates stay.
# usage: docker/make-certs.sh FOLDER NAME[,ALTERNATIVE...]...
#   docker/make-certs.sh tls coordinator,10.0.0.1 worker-1 worker-2 cli
# Gives FOLDER/ca.key (keep it offline) and FOLDER/NAME/{ca,cert,key}.pem, to mount at /etc/heddle/tls.
# HEDDLE_UID (default 10001, the uid of the images) owns the keys when this runs as root.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,7s/^# \?//p' "$0" >&2
  exit 2
fi
folder=$1
shift
umask 077
mkdir -p "$folder"
readonly DAYS=365 CURVE=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)

if [ ! -f "$folder/ca.key" ]; then
  openssl req -x509 "${CURVE[@]}" -keyout "$folder/ca.key" -out "$folder/ca.pem" -days $((DAYS * 5)) \
    -subj "/CN=heddle authority" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
fi

for entry in "$@"; do
  IFS=, read -r -a names <<< "$entry"
  name=${names[0]}
  case $name in
    '' | */* | .*) echo "make-certs: bad name '$name'" >&2; exit 2 ;;
  esac
  if [ -f "$folder/$name/cert.pem" ]; then
    continue
  fi
  san=
  for alternative in "${names[@]}" localhost; do
    if [[ $alternative =~ ^[0-9.]+$ || $alternative == *:* ]]; then
      san+=,IP:$alternative
    else
      san+=,DNS:$alternative
    fi
  done
  part=$(mktemp -d "$folder/.part.XXXXXX")
  openssl req "${CURVE[@]}" -keyout "$part/key.pem" -out "$part/request" -subj "/CN=$name" 2>/dev/null
  printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n' "${san#,}" \
    > "$part/extensions"
  openssl x509 -req -in "$part/request" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -days "$DAYS" -extfile "$part/extensions" -out "$part/cert.pem" 2>/dev/null
  cp "$folder/ca.pem" "$part/ca.pem"
  rm "$part/request" "$part/extensions"
  if [ "$(id -u)" = 0 ]; then
    chown -R "${HEDDLE_UID:-10001}" "$part"
  fi
  mv "$part" "$folder/$name"
  echo "make-certs: $folder/$name"
done
