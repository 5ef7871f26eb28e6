"""Sessions of tpm2-tools that flush nothing, in which each of them takes part.

Each is a shell script for bash in a folder of its own, `PRELUDE` before it. What it finds holds, or
the script fails: `refused TEXT COMMAND` wants a failure that says so, `same FILE FILE` equal bytes.
"""

from __future__ import annotations

from typing import Final

from tests.support.tpm2_policies import POLICIES

PRELUDE: Final = r"""
set -euo pipefail
refused() {
    local text=$1 said
    shift
    if said=$("$@" 2>&1 </dev/null); then echo "not refused: $*" >&2; exit 1; fi
    echo "$said" >&2
    [[ $said == *"$text"* ]] || { echo "refused, but not for: $text" >&2; exit 1; }
}
same() { cmp "$1" "$2"; }
differ() { if cmp -s "$1" "$2"; then echo "$1 and $2 are equal" >&2; return 1; fi; }
hex() { od -An -v -tx1 "$@" | tr -d ' \n'; }
says() { grep -e "$1" >&2; }
verified() { openssl dgst -sha256 -verify "$1" -signature "$2" "$3" >&2; }
primary() { tpm2_createprimary -Q -C o -G ecc -c primary.ctx; }
signer() {
    primary
    tpm2_create -Q -C primary.ctx -G ecc -u signer.pub -r signer.priv -c signer.ctx
    tpm2_readpublic -Q -c signer.ctx -f pem -o signer.pem
}
sealed() { # ARGUMENT... of tpm2_create
    echo -n 'a secret' >secret
    primary
    tpm2_create -Q -C primary.ctx -i secret -u seal.pub -r seal.priv -c seal.ctx "$@"
}
by_policy() { sealed -L policy -a 'fixedtpm|fixedparent'; }
trial() { tpm2_startauthsession -S trial.ctx; }
policy() { tpm2_startauthsession --policy-session -S policy.ctx; }
unsealed() { tpm2_unseal -c seal.ctx -p session:policy.ctx >found; same secret found; }
locked() { refused 'policy check failed' tpm2_unseal -c seal.ctx -p session:policy.ctx; }
authority() {
    openssl ecparam -name prime256v1 -genkey -noout -out authority.key
    openssl ec -in authority.key -pubout -out authority.pem 2>/dev/null
    tpm2_loadexternal -Q -C o -G ecc -u authority.pem -c authority.ctx -n authority.name
}
approve() { # POLICY: a ticket that the authority approves of it
    openssl dgst -sha256 -sign authority.key -out approval "$1"
    tpm2_verifysignature -c authority.ctx -g sha256 -m "$1" -s approval -f ecdsa -t ticket
}
"""

SCENARIOS: Final = {
    "activatecredential": """
        tpm2_createek -Q -G ecc -c ek.ctx -u ek.pub
        tpm2_createak -Q -C ek.ctx -G ecc -s ecdsa -g sha256 -c ak.ctx -u ak.pub -n ak.name
        echo -n 'a credential' >credential
        tpm2_makecredential -Q -e ek.pub -s credential -n "$(hex ak.name)" -o blob
        policy
        tpm2_policysecret -Q -S policy.ctx -c e
        tpm2_activatecredential -Q -c ak.ctx -C ek.ctx -i blob -o found -P session:policy.ctx
        same credential found
        tpm2_createak -Q -C ek.ctx -G ecc -s ecdsa -g sha256 -c other.ctx -u other.pub -n other.name
        tpm2_startauthsession --policy-session -S again.ctx
        tpm2_policysecret -Q -S again.ctx -c e
        refused 'integrity' tpm2_activatecredential -c other.ctx -C ek.ctx -i blob -o no \\
            -P session:again.ctx
    """,
    "certify": """
        signer
        tpm2_create -Q -C primary.ctx -G rsa -u key.pub -r key.priv -c key.ctx
        tpm2_certify -Q -c key.ctx -C signer.ctx -g sha256 -f plain -o attest -s signature
        verified signer.pem signature attest
        tpm2_readpublic -Q -c key.ctx -n key.name
        [[ $(hex attest) == *$(hex key.name)* ]]
    """,
    "certifycreation": """
        signer
        tpm2_create -Q -C primary.ctx -G ecc -u key.pub -r key.priv \\
            --creation-data data -d hash -t ticket
        tpm2_load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx
        tpm2_certifycreation -Q -C signer.ctx -c key.ctx -d hash -t ticket -g sha256 -f plain \\
            -o signature --attestation attest
        verified signer.pem signature attest
        refused 'invalid ticket' tpm2_certifycreation -C signer.ctx -c signer.ctx -d hash \\
            -t ticket -g sha256 -f plain -o no --attestation none
    """,
    "certifyX509certutil": """
        tpm2_certifyX509certutil -o partial.der -d 365
        openssl asn1parse -inform DER -in partial.der >&2
    """,
    "changeauth": """
        sealed -p first
        tpm2_unseal -c seal.ctx -p first >found
        same secret found
        tpm2_changeauth -Q -C primary.ctx -c seal.ctx -p first -r new.priv second
        tpm2_load -Q -C primary.ctx -u seal.pub -r new.priv -c new.ctx
        tpm2_unseal -c new.ctx -p second >found
        same secret found
        refused '0x98E' tpm2_unseal -c new.ctx -p first
    """,
    "changepps": """
        name() { tpm2_createprimary -Q -C p -G ecc -c $1.ctx; tpm2_readpublic -Q -c $1.ctx -n $1; }
        name before
        tpm2_changepps -Q
        refused 'integrity' tpm2_readpublic -c before.ctx
        name after
        differ before after
    """,
    "clear": """
        tpm2_changeauth -c o owned
        tpm2_createprimary -Q -C o -P owned -G ecc -c before.ctx
        tpm2_clearcontrol -C p s
        refused 'disabled' tpm2_clear -c p
        tpm2_clearcontrol -C p c
        tpm2_clear -c p
        refused 'integrity' tpm2_readpublic -c before.ctx
        primary
        tpm2_readpublic -Q -c primary.ctx
    """,
    "clock": """
        tpm2_readclock | tee before >&2
        later=$(($(awk '$1 == "clock:" {print $2}' before) + 3600000))
        tpm2_setclock "$later"
        [[ $(tpm2_readclock | awk '$1 == "clock:" {print $2}') -ge $later ]]
        refused '0x' tpm2_setclock 1
        tpm2_clockrateadjust s
        tpm2_clockrateadjust f
        signer
        tpm2_gettime -Q -c signer.ctx -g sha256 -f plain -o signature --attestation attest
        verified signer.pem signature attest
    """,
    "commit": """
        primary
        tpm2_create -Q -C primary.ctx -G ecc256:ecdaa -u key.pub -r key.priv -c key.ctx
        tpm2_commit -Q -c key.ctx -t first --eccpoint-K K --eccpoint-L L -u E
        tpm2_commit -Q -c key.ctx -t second --eccpoint-K K2 --eccpoint-L L2 -u E2
        [[ -s E && -s E2 ]]
        differ first second
    """,
    "dictionarylockout": """
        sealed -p right
        tpm2_dictionarylockout -s -n 3 -t 1000 -l 1000
        tpm2_unseal -Q -c seal.ctx -p right || tpm2_unseal -Q -c seal.ctx -p right
        for _ in 1 2 3; do refused '0x98E' tpm2_unseal -c seal.ctx -p wrong; done
        refused '0x921' tpm2_unseal -c seal.ctx -p right
        tpm2_dictionarylockout -c
        tpm2_unseal -c seal.ctx -p right >found
        same secret found
        tpm2_getcap properties-variable | says 'TPM2_PT_LOCKOUT_COUNTER: 0x0'
    """,
    "duplicate": """
        trial
        tpm2_policycommandcode -Q -S trial.ctx -L policy TPM2_CC_Duplicate
        primary
        tpm2_create -Q -C primary.ctx -G ecc -L policy -a 'sensitivedataorigin|sign|userwithauth' \\
            -u key.pub -r key.priv -c key.ctx
        tpm2_createprimary -Q -C e -G ecc -c other.ctx
        refused '0x' tpm2_duplicate -C other.ctx -c key.ctx -G null -r no -s none
        policy
        tpm2_policycommandcode -Q -S policy.ctx TPM2_CC_Duplicate
        tpm2_duplicate -C other.ctx -c key.ctx -G null -p session:policy.ctx -r dup -s seed
        tpm2_import -Q -C other.ctx -u key.pub -i dup -s seed -r moved.priv
        tpm2_load -Q -C other.ctx -u key.pub -r moved.priv -c moved.ctx
        echo 'one message' >message
        tpm2_sign -Q -c moved.ctx -g sha256 -f plain -o signature message
        tpm2_readpublic -Q -c key.ctx -f pem -o key.pem
        verified key.pem signature message
    """,
    "ecdh": """
        primary
        for name in here there; do
            tpm2_create -Q -C primary.ctx -G ecc256:ecdh -u $name.pub -r $name.priv -c $name.ctx
        done
        tpm2_ecdhkeygen -c here.ctx -u point -o shared
        tpm2_ecdhzgen -c here.ctx -u point -o found
        same shared found
        tpm2_ecdhzgen -c there.ctx -u point -o other
        differ shared other
        tpm2_geteccparameters ecc256 -o curve
        [[ -s curve ]]
    """,
    "encodeobject": """
        primary
        tpm2_create -Q -C primary.ctx -G ecc -u key.pub -r key.priv
        tpm2_encodeobject -Q -C primary.ctx -u key.pub -r key.priv -o key.pem
        tpm2_print -t TSSPRIVKEY_OBJ -f pem key.pem >printed.pem
        tpm2_load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx
        tpm2_readpublic -Q -c key.ctx -f pem -o public.pem
        same public.pem printed.pem
        grep -q 'BEGIN TSS2 PRIVATE KEY' key.pem
    """,
    "encryptdecrypt": """
        primary
        tpm2_create -Q -C primary.ctx -G aes128cfb -u key.pub -r key.priv -c key.ctx
        head -c 3000 /dev/urandom >plain
        head -c 16 /dev/urandom >iv
        tpm2_encryptdecrypt -Q -c key.ctx -t iv -o secret plain
        tpm2_encryptdecrypt -Q -c key.ctx -d -t iv -o found secret
        same plain found
        differ plain secret
    """,
    "eventlog": r"""
        # A log of one event, as firmware writes it, and the PCR that it explains.
        digest=$(printf 'an event' | openssl dgst -sha1 | sed 's/.* //')
        {
            printf '\x10\0\0\0\x05\0\0\0'
            printf 'an event' | openssl dgst -sha1 -binary
            printf '\x08\0\0\0an event'
        } >log
        tpm2_pcrreset 16
        tpm2_pcrextend "16:sha1=$digest"
        tpm2_pcrread -Q sha1:16 -o pcr
        tpm2_eventlog log >said
        grep -qi "$(hex pcr)" said
    """,
    "evictcontrol": """
        signer
        tpm2_evictcontrol -Q -C o -c signer.ctx 0x81000123
        tpm2_getcap handles-persistent | says 0x81000123
        echo 'one message' >message
        for _ in 1 2 3; do tpm2_sign -Q -c 0x81000123 -g sha256 -f plain -o signature message; done
        verified signer.pem signature message
        tpm2_readpublic -Q -c 0x81000123 -t signer.tr
        tpm2_print -t ESYS_TR signer.tr >&2
        tpm2_evictcontrol -Q -C o -c 0x81000123
        refused '0x18B' tpm2_readpublic -c 0x81000123
    """,
    "flushcontext": """
        sealed
        trial
        tpm2_flushcontext trial.ctx
        refused '0x' tpm2_policypassword -S trial.ctx -L no
        tpm2_flushcontext -t
        tpm2_flushcontext -l
        tpm2_flushcontext -s
        tpm2_unseal -c seal.ctx >found
        same secret found
    """,
    "getcommandauditdigest": """
        signer
        tpm2_setcommandauditstatus TPM2_CC_Unseal
        tpm2_getcommandauditdigest -Q -c signer.ctx -g sha256 -f plain -m one -s signature
        verified signer.pem signature one
        sealed
        tpm2_unseal -Q -c seal.ctx
        tpm2_getcommandauditdigest -Q -c signer.ctx -g sha256 -f plain -m two -s signature
        verified signer.pem signature two
        tpm2_setcommandauditstatus -c TPM2_CC_Unseal
    """,
    "getekcertificate": """
        tpm2_getekcertificate -o ek.der
        tpm2_createek -Q -G rsa -c ek.ctx -u ek.pem -f pem
        openssl x509 -inform DER -in ek.der -noout -pubkey >certified.pem
        openssl pkey -pubin -in certified.pem -outform DER -out one
        openssl pkey -pubin -in ek.pem -outform DER -out two
        same one two
    """,
    "getsessionauditdigest": """
        signer
        tpm2_startauthsession -S audit.ctx --audit-session
        tpm2_getrandom -Q 8 -S audit.ctx
        tpm2_getsessionauditdigest -Q -c signer.ctx -g sha256 -f plain -m one -s signature \\
            -S audit.ctx
        verified signer.pem signature one
        tpm2_getrandom -Q 8 -S audit.ctx
        tpm2_getsessionauditdigest -Q -c signer.ctx -g sha256 -f plain -m two -s signature \\
            -S audit.ctx
        verified signer.pem signature two
        differ one two
    """,
    "hash": """
        head -c 5000 /dev/urandom >data
        tpm2_hash -Q -C o -g sha256 -o digest -t ticket data
        openssl dgst -sha256 -binary -out known data
        same digest known
        primary
        tpm2_create -Q -C primary.ctx -G ecc:ecdsa:null -a \\
            'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign|restricted' \\
            -u key.pub -r key.priv -c key.ctx
        tpm2_sign -Q -c key.ctx -g sha256 -d -t ticket -f plain -o signature digest
        tpm2_readpublic -Q -c key.ctx -f pem -o key.pem
        verified key.pem signature data
        refused 'ticket' tpm2_sign -c key.ctx -g sha256 -d -f plain -o no digest
    """,
    "hierarchycontrol": """
        tpm2_createprimary -Q -C e -G ecc -c endorsement.ctx
        tpm2_hierarchycontrol -C p ehEnable clear
        refused 'hierarchy is not enabled' tpm2_readpublic -c endorsement.ctx
        tpm2_hierarchycontrol -C p ehEnable set
        tpm2_readpublic -Q -c endorsement.ctx
        tpm2_getcap properties-variable | says 'ehEnable: *1'
    """,
    "hmac": """
        primary
        tpm2_create -Q -C primary.ctx -G hmac -u key.pub -r key.priv -c key.ctx
        head -c 4000 /dev/urandom >data
        tpm2_hmac -Q -c key.ctx -o one data
        tpm2_hmac -Q -c key.ctx -o two <data
        same one two
        echo -n 0123456789abcdef >secret
        tpm2_import -Q -C primary.ctx -G hmac -i secret -u known.pub -r known.priv
        tpm2_load -Q -C primary.ctx -u known.pub -r known.priv -c known.ctx
        tpm2_hmac -c known.ctx -o found data
        openssl dgst -sha256 -hmac 0123456789abcdef -binary -out known data
        same found known
    """,
    "import": """
        primary
        openssl ecparam -name prime256v1 -genkey -noout -out key.pem
        openssl ec -in key.pem -pubout -out public.pem 2>/dev/null
        tpm2_import -Q -C primary.ctx -G ecc -i key.pem -u key.pub -r key.priv
        tpm2_load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx
        echo 'one message' >message
        tpm2_sign -Q -c key.ctx -g sha256 -f plain -o signature message
        verified public.pem signature message
    """,
    "nv": """
        tpm2_nvdefine -Q -C o 0x1500001 -s 32 -a 'ownerread|ownerwrite|read_stclear|writedefine'
        head -c 32 /dev/urandom >data
        tpm2_nvwrite -Q -C o 0x1500001 -i data
        tpm2_nvread -C o 0x1500001 >found
        same data found
        tpm2_nvreadpublic 0x1500001 | says 'size: 32'
        tpm2_nvwritelock -Q -C o 0x1500001
        refused 'NV access locked' tpm2_nvwrite -C o 0x1500001 -i data
        tpm2_nvreadlock -Q -C o 0x1500001
        refused 'NV access locked' tpm2_nvread -C o 0x1500001
        tpm2_nvundefine -Q -C o 0x1500001
        refused '0x18B' tpm2_nvreadpublic 0x1500001
    """,
    "nvcertify": """
        signer
        tpm2_nvdefine -Q -C o 0x1500002 -s 8 -a 'authread|authwrite|ownerread'
        echo -n 'nv value' | tpm2_nvwrite -Q 0x1500002 -i -
        tpm2_nvcertify -Q -C signer.ctx -g sha256 -f plain -o signature --attestation attest \\
            --size 8 0x1500002
        verified signer.pem signature attest
        grep -q 'nv value' attest
        tpm2_nvundefine -Q -C o 0x1500002
    """,
    "nvkinds": """
        tpm2_nvdefine -Q -C o 0x1500003 -a 'ownerread|ownerwrite|nt=counter'
        tpm2_nvincrement -Q -C o 0x1500003
        one=$((0x$(tpm2_nvread -C o 0x1500003 | hex)))
        tpm2_nvincrement -Q -C o 0x1500003
        two=$((0x$(tpm2_nvread -C o 0x1500003 | hex)))
        ((two == one + 1))
        tpm2_nvdefine -Q -C o 0x1500004 -a 'ownerread|ownerwrite|nt=bits'
        tpm2_nvsetbits -Q -C o 0x1500004 -i 0x5
        tpm2_nvsetbits -Q -C o 0x1500004 -i 0x8
        [[ $(tpm2_nvread -C o 0x1500004 | hex) == 000000000000000d ]]
        tpm2_nvdefine -Q -C o 0x1500005 -a 'ownerread|ownerwrite|nt=extend'
        echo -n data | tpm2_nvextend -Q -C o 0x1500005 -i -
        { head -c 32 /dev/zero; echo -n data; } | openssl dgst -sha256 -binary >known
        tpm2_nvread -C o 0x1500005 >found
        same known found
        for index in 0x1500003 0x1500004 0x1500005; do tpm2_nvundefine -Q -C o $index; done
    """,
    "pcr": """
        tpm2_pcrreset 16
        tpm2_pcrread -Q sha256:16 -o pcr
        head -c 32 /dev/zero | cmp - pcr
        echo -n data >data
        digest=$(openssl dgst -sha256 data | sed 's/.* //')
        tpm2_pcrextend "16:sha256=$digest"
        tpm2_pcrread -Q sha256:16 -o extended
        tpm2_pcrreset 16
        tpm2_pcrevent -Q 16 data
        tpm2_pcrread -Q sha256:16 -o measured
        same extended measured
        tpm2_pcrallocate -Q sha1:all+sha256:all+sha384:none+sha512:none
        tpm2_getcap pcrs | says sha256
    """,
    "quote": """
        tpm2_createek -Q -G ecc -c ek.ctx -u ek.pub
        tpm2_createak -Q -C ek.ctx -G ecc -s ecdsa -g sha256 -c ak.ctx -u ak.pem -f pem -n ak.name
        tpm2_quote -Q -c ak.ctx -l sha256:0,16 -q 11223344 -g sha256 -m quote -s signature -o pcrs
        check=(tpm2_checkquote -Q -u ak.pem -m quote -s signature -f pcrs -g sha256)
        "${check[@]}" -q 11223344
        refused 'nonce' "${check[@]}" -q 11223345
        tpm2_print -t TPMS_ATTEST quote | says 11223344
    """,
    "random": """
        tpm2_getrandom -o one 32
        echo 'more of it' | tpm2_stirrandom
        tpm2_getrandom -o two 32
        [[ $(stat -c %s two) == 32 ]]
        differ one two
    """,
    "rc_decode": """
        refused '0x18B' tpm2_readpublic -c 0x81000777
        tpm2_rc_decode 0x18b | says handle
        tpm2_rc_decode 0xb0902 | says 'out of memory for object contexts'
    """,
    "rsa": """
        primary
        tpm2_create -Q -C primary.ctx -G rsa -u key.pub -r key.priv -c key.ctx
        echo -n 'a message' >message
        tpm2_rsaencrypt -Q -c key.ctx -o secret message
        tpm2_rsadecrypt -Q -c key.ctx -o found secret
        same message found
        tpm2_readpublic -Q -c key.ctx -f pem -o key.pem
        openssl pkeyutl -encrypt -pubin -inkey key.pem -in message -out secret
        tpm2_rsadecrypt -Q -c key.ctx -o found secret
        same message found
    """,
    "send": r"""
        printf '\x80\1\0\0\0\x0c\0\0\1\x7b\0\x08' | tpm2_send >answer
        [[ $(stat -c %s answer) == 20 ]]
        printf '\x80\1\0\0\0\x0e\0\0\1\x65\2\0\0\1' | tpm2_send >answer
        [[ $(hex -j 6 answer) == 000b01cb ]]
    """,
    "sessions": """
        primary
        tpm2_startauthsession -S bound.ctx --hmac-session -c primary.ctx
        tpm2_sessionconfig bound.ctx --enable-encrypt
        tpm2_create -Q -C primary.ctx -G ecc -u key.pub -r key.priv -P session:bound.ctx
        tpm2_sessionconfig bound.ctx --disable-continuesession
        # Where the session ends the tool looks for it, in vain.
        refused '0x' tpm2_load -C primary.ctx -u key.pub -r key.priv -c no.ctx -P session:bound.ctx
        refused '' tpm2_load -C primary.ctx -u key.pub -r key.priv -c no.ctx -P session:bound.ctx
    """,
    "sign": """
        signer
        echo 'one message' >message
        tpm2_sign -Q -c signer.ctx -g sha256 -o signature message
        tpm2_verifysignature -Q -c signer.ctx -g sha256 -m message -s signature
        echo 'another message' >message
        refused '0x2DB' tpm2_verifysignature -c signer.ctx -g sha256 -m message -s signature
    """,
    "startup": """
        sealed
        tpm2_shutdown -c
        tpm2_startup -c
        tpm2_unseal -c seal.ctx >found
        same secret found
    """,
    "tests": """
        tpm2_selftest -f
        tpm2_incrementalselftest rsa ecc sha256
        tpm2_gettestresult | says success
        tpm2_testparms ecc:ecdsa
        tpm2_testparms rsa2048
        refused '' tpm2_testparms rsa512
    """,
    "zgen2phase": """
        primary
        tpm2_create -Q -C primary.ctx -G ecc256:ecdh -u key.pub -r key.priv -c key.ctx
        tpm2_ecephemeral -Q -u ephemeral -t counter ecc256
        tpm2_ecdhkeygen -c key.ctx -u static -o shared
        number=$((0x$(hex counter)))
        tpm2_zgen2phase -Q -c key.ctx --static-public static --ephemeral-public static \\
            -t "$number" --output-Z1 one --output-Z2 two
        same one shared
    """,
    "changeeps": """
        # After the one that asks for the certificate: the endorsement keys are others from now on.
        name() { tpm2_createprimary -Q -C e -G ecc -c $1.ctx; tpm2_readpublic -Q -c $1.ctx -n $1; }
        name before
        name again
        same before again
        tpm2_changeeps -Q
        refused 'integrity' tpm2_readpublic -c before.ctx
        name after
        differ before after
    """,
    "the program of all": """
        tpm2 createprimary -Q -C o -G ecc -c primary.ctx
        tpm2 create -Q -C primary.ctx -G ecc -u key.pub -r key.priv -c key.ctx
        tpm2 readpublic -Q -c key.ctx
    """,
    **POLICIES,
}
