# Sourced by the other scripts: makes .venv in the project's root once, activates it, goes to the root, and defines
# `attached`.
# Needs python 3.11 or later and nothing else. PYTHON names another interpreter (default: python3).

cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/installed-$(sha256sum requirements.txt | cut -c1-16)
if [ ! -e "$stamp" ]; then
  echo "== installing requirements.txt into .venv (once, a few minutes)"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: python 3.11 or later is needed; name one with PYTHON=..." >&2; return 2; }
  # torch first: what it pulls in is large, and DeepSpeed's own installation looks for it.
  "${PYTHON:-python3}" -m venv .venv && .venv/bin/pip install --quiet --upgrade pip &&
    .venv/bin/pip install --quiet "$(grep '^torch==' requirements.txt)" &&
    .venv/bin/pip install --quiet -r requirements.txt && touch "$stamp" || return 1
fi
. .venv/bin/activate

# The scripts' libraries speak of things that matter elsewhere; their errors still show.
export TOKENIZERS_PARALLELISM=true TRANSFORMERS_VERBOSITY=error

# oneDNN keeps buffers for each of the last 1,024 shapes of a product in bf16: many GiB, as rows have many lengths.
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=${ONEDNN_PRIMITIVE_CACHE_CAPACITY:-32} LRU_CACHE_CAPACITY=${LRU_CACHE_CAPACITY:-32}

# attached COMMAND...: a command that gets SIGTERM when this shell is gone, by SIGKILL too (on Linux).
attached() {
  if setpriv --pdeathsig TERM true 2> /dev/null; then setpriv --pdeathsig TERM "$@"; else "$@"; fi
}
