#!/bin/sh
# A Chromium for the tests of `cwdm report`, where no browser is installed: the one that npm has, unpacked
# into an environment. Usage: tools/chromium.sh .venv, which makes .venv/bin/chromium.
# Fails, without harm, where there is no npm, no network, or not Linux on x86-64.
set -eu
[ "$(uname -sm)" = "Linux x86_64" ]
mkdir -p "$1/chromium"
cd "$1/chromium"
npm pack --silent --fetch-retries=0 @sparticuz/chromium@147.0.0 >/dev/null
tar xzf sparticuz-chromium-147.0.0.tgz
node -e '
const { readFileSync, writeFileSync } = require("fs"), { brotliDecompressSync } = require("zlib");
for (const name of ["chromium", "swiftshader.tar", "al2023.tar", "fonts.tar"])
  writeFileSync(name, brotliDecompressSync(readFileSync(`package/bin/${name}.br`)));'
for archive in swiftshader al2023 fonts; do tar xf $archive.tar --no-same-owner; rm $archive.tar; done
rm -r package sparticuz-chromium-147.0.0.tgz
chmod +x chromium
# it brings libraries and fonts, for systems that have none
cat > ../bin/chromium <<END
#!/bin/sh
if ldd $PWD/chromium | grep -q "not found"; then export LD_LIBRARY_PATH=$PWD/lib; fi
[ -d /etc/fonts ] || export FONTCONFIG_PATH=$PWD
exec $PWD/chromium "\$@"
END
chmod +x ../bin/chromium
