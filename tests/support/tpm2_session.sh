#!/bin/sh
# A session with tpm2-tools on the TPM 2.0 that TPM2TOOLS_TCTI names: keys, NV, PCRs, quotes,
# sealing. Works in a folder of its own and leaves the TPM with PCRs 12 and 16 extended. Ends with
# status 0 if every answer is right; "session passed" is its last line then.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

fails() {
    if "$@" >/dev/null 2>&1; then
        echo "this should have failed: $*" >&2
        exit 1
    fi
}

same() { # WHAT IS WANTED
    if [ "$2" != "$3" ]; then
        echo "$1: $2, not $3" >&2
        exit 1
    fi
}

flush() { tpm2_flushcontext -t; }
pcr() { tpm2_pcrread "sha256:$1" | sed -n 's/^ *[0-9]* *: 0x//p' | tr A-F a-f; }

random=$(tpm2_getrandom --hex 16)
same "length of random bytes" "${#random}" 32
fails [ "$random" = "$(tpm2_getrandom --hex 16)" ]

tpm2_createprimary -Q -C o -G rsa2048 -c rsa.ctx
flush
tpm2_createprimary -Q -C o -G ecc -c primary.ctx
flush

echo "one message" >message
tpm2_create -Q -C primary.ctx -G ecc:ecdsa-sha256:null -u key.pub -r key.priv \
    -a "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"
flush
tpm2_load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx
flush
tpm2_sign -c key.ctx -g sha256 -o signature message
flush
tpm2_verifysignature -c key.ctx -g sha256 -m message -s signature
flush
echo "another message" >message
fails tpm2_verifysignature -c key.ctx -g sha256 -m message -s signature
flush

printf 'thirty-two bytes of contents!!!!' >data
tpm2_nvdefine 0x1500021 -Q -C o -s 32 -a "ownerread|ownerwrite"
tpm2_nvwrite 0x1500021 -Q -C o -i data
same "NV contents" "$(tpm2_nvread 0x1500021 -C o -s 32)" "thirty-two bytes of contents!!!!"
tpm2_nvundefine 0x1500021 -Q -C o
fails tpm2_nvread 0x1500021 -C o -s 32

before=$(pcr 16)
digest=$(printf hello | sha256sum | cut -d ' ' -f 1)
tpm2_pcrextend "16:sha256=$digest"
# The new value is the hash of the bytes of both, which printf makes from octal numbers.
octal=$(printf '%s' "$before$digest" | sed 's/../0x& /g')
# shellcheck disable=SC2046,SC2059,SC2086
expected=$(printf "$(printf '\\%03o' $octal)" | sha256sum | cut -d ' ' -f 1)
same "PCR 16" "$(pcr 16)" "$expected"

tpm2_create -Q -C primary.ctx -G ecc:ecdsa-sha256:null -u ak.pub -r ak.priv -c ak.ctx \
    -a "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign|restricted"
flush
tpm2_readpublic -Q -c ak.ctx -f pem -o ak.pem
flush
tpm2_quote -Q -c ak.ctx -l sha256:0,16 -q 11223344 -g sha256 -m quote -s signature -o pcrs
flush
tpm2_checkquote -Q -u ak.pem -m quote -s signature -f pcrs -g sha256 -q 11223344
fails tpm2_checkquote -Q -u ak.pem -m quote -s signature -f pcrs -g sha256 -q 11223345

printf 'a secret' >secret
tpm2_createpolicy -Q --policy-pcr -l sha256:12 -L policy
tpm2_create -Q -C primary.ctx -i secret -L policy -a "fixedtpm|fixedparent" \
    -u seal.pub -r seal.priv
flush
tpm2_load -Q -C primary.ctx -u seal.pub -r seal.priv -c seal.ctx
flush
same "unsealed" "$(tpm2_unseal -c seal.ctx -p pcr:sha256:12)" "a secret"
flush
tpm2_pcrextend "12:sha256=$digest"
fails tpm2_unseal -c seal.ctx -p pcr:sha256:12
flush
echo "session passed"
