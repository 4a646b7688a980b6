#!/bin/bash
# Start vLLM when Ollama has left the GPU: vLLM takes its share of the memory at once, and what Ollama holds then is
# missing, or goes to the CPU. VLLM_BESIDE_OLLAMA=yes: both are meant to run. Arguments go to `vllm serve`.
set -eu
ollama=${OLLAMA_ADDRESS:-ollama:11434}
answers() { (exec 3<>"/dev/tcp/${ollama%:*}/${ollama##*:}") 2>/dev/null; }

if [ "${VLLM_BESIDE_OLLAMA:-}" != yes ] && answers; then
  echo "waiting: Ollama answers at $ollama and has the same GPU. Stop it (docker/engine.sh vllm), or set" \
    "VLLM_BESIDE_OLLAMA=yes." >&2
  while answers; do sleep 1; done
  echo "Ollama is gone" >&2
fi
exec vllm serve "$@"
