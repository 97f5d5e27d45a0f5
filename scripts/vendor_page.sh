#!/usr/bin/env bash
# Takes the chat page's one library, marked, from npm: this version, with this content, and its licence.
set -euo pipefail

version=18.2.1
sha512=ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/cI6p8z57FxliACboTruMA==
vendor=$(cd "$(dirname "$0")/../phi3_mlflow/serve/page/vendor" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cd "$folder"
npm pack --silent "marked@$version" > /dev/null
if [ "$(openssl dgst -sha512 -binary "marked-$version.tgz" | base64 -w 0)" != "$sha512" ]; then
  echo "marked $version from npm is not what it was: its sha512 is not the one in this script" >&2
  exit 1
fi
tar xzf "marked-$version.tgz"
# The source map is not shipped; a browser's developer tools would ask for it.
sed '/^\/\/# sourceMappingURL=/d' package/lib/marked.esm.js > "$vendor/marked.js"
cp package/LICENSE "$vendor/marked.LICENSE.txt"
