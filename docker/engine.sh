#!/bin/sh
# Say which engine has the GPU, and wait until it serves:
#
#   docker/engine.sh ollama    chat: stops vLLM
#   docker/engine.sh vllm      ingestion: stops Ollama
#   docker/engine.sh both      both at once: lower --gpu-memory-utilization in the compose file first
#
# Further arguments go to `docker compose`, such as --env-file.
set -eu
engine=${1:-}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/.."
compose() { docker compose -f docker-compose.dgx-spark.yml --profile ingestion "$@"; }

case $engine in
  ollama) compose "$@" stop vllm && compose "$@" up -d --wait redis ollama ;;
  vllm) compose "$@" stop ollama && compose "$@" up -d --wait redis vllm ;;
  both) VLLM_BESIDE_OLLAMA=yes && export VLLM_BESIDE_OLLAMA && compose "$@" up -d --wait redis ollama vllm ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' docker/engine.sh >&2; exit 2 ;;
esac
