"""Sessions of tpm2-tools with policies (`tests.support.tpm2_sessions`)."""

from __future__ import annotations

from typing import Final

POLICIES: Final = {
    "policyauthorize": """
        authority
        trial
        tpm2_policyauthorize -Q -S trial.ctx -L policy -n authority.name
        by_policy
        tpm2_startauthsession -S pcr.ctx
        tpm2_policypcr -Q -S pcr.ctx -l sha256:17 -L pcr.policy
        approve pcr.policy
        policy
        tpm2_policypcr -Q -S policy.ctx -l sha256:17
        tpm2_policyauthorize -Q -S policy.ctx -i pcr.policy -n authority.name -t ticket
        unsealed
        policy
        tpm2_policypcr -Q -S policy.ctx -l sha256:18
        refused '0x' tpm2_policyauthorize -S policy.ctx -i pcr.policy -n authority.name -t ticket
        locked
    """,
    "policyauthorizenv": """
        tpm2_nvdefine -Q -C o -p nv 0x1500006 -a 'authread|authwrite' -s 34
        trial
        tpm2_policypassword -Q -S trial.ctx -L password.policy
        { printf '\\0\\x0b'; cat password.policy; } | tpm2_nvwrite -Q -P nv 0x1500006 -i -
        trial
        tpm2_policyauthorizenv -Q -S trial.ctx -C 0x1500006 -P nv -L policy 0x1500006
        by_policy
        policy
        locked
        policy
        tpm2_policypassword -Q -S policy.ctx
        tpm2_policyauthorizenv -Q -S policy.ctx -C 0x1500006 -P nv 0x1500006
        unsealed
        tpm2_nvundefine -Q -C o 0x1500006
    """,
    "policyauthvalue": """
        trial
        tpm2_policyauthvalue -Q -S trial.ctx -L policy
        sealed -p word -L policy -a 'fixedtpm|fixedparent'
        policy
        tpm2_policyauthvalue -Q -S policy.ctx
        tpm2_unseal -c seal.ctx -p session:policy.ctx+word >found
        same secret found
        policy
        tpm2_policyauthvalue -Q -S policy.ctx
        refused '0x98E' tpm2_unseal -c seal.ctx -p session:policy.ctx+other
        tpm2_dictionarylockout -c
    """,
    "policycommandcode": """
        trial
        tpm2_policycommandcode -Q -S trial.ctx -L policy TPM2_CC_Unseal
        by_policy
        policy
        tpm2_policycommandcode -Q -S policy.ctx TPM2_CC_Sign
        refused '0x' tpm2_unseal -c seal.ctx -p session:policy.ctx
        policy
        tpm2_policycommandcode -Q -S policy.ctx TPM2_CC_Unseal
        unsealed
    """,
    "policycountertimer": """
        trial
        tpm2_policycountertimer -Q -S trial.ctx -L policy --ult 3600000000
        by_policy
        policy
        tpm2_policycountertimer -Q -S policy.ctx --ult 3600000000
        unsealed
        policy
        refused '0x126' tpm2_policycountertimer -S policy.ctx --ult 1
        locked
    """,
    "policycphash": """
        authority
        trial
        tpm2_policyauthorize -Q -S trial.ctx -L policy -n authority.name
        tpm2_nvdefine -Q -C o 0x1500007 -a 'policywrite|authwrite|ownerread|nt=bits' -L policy
        tpm2_nvsetbits -Q 0x1500007 -i 1 --cphash cphash
        trial
        tpm2_policycphash -Q -S trial.ctx -L cp.policy --cphash cphash
        approve cp.policy
        allow() {
            policy
            tpm2_policycphash -Q -S policy.ctx --cphash cphash
            tpm2_policyauthorize -Q -S policy.ctx -i cp.policy -n authority.name -t ticket
        }
        allow
        refused '0x' tpm2_nvsetbits 0x1500007 -i 2 -P session:policy.ctx
        allow
        tpm2_nvsetbits -Q 0x1500007 -i 1 -P session:policy.ctx
        tpm2_nvundefine -Q -C o 0x1500007
    """,
    "policyduplicationselect": """
        tpm2_createprimary -Q -C n -G ecc -c parent.ctx
        tpm2_readpublic -Q -c parent.ctx -n parent.name
        trial
        tpm2_policyduplicationselect -Q -S trial.ctx -N parent.name -L policy
        primary
        tpm2_create -Q -C primary.ctx -G ecc -L policy -a 'sensitivedataorigin|sign' \\
            -u key.pub -r key.priv -c key.ctx
        tpm2_readpublic -Q -c key.ctx -n key.name
        allow() {
            policy
            tpm2_policyduplicationselect -Q -S policy.ctx -N parent.name -n key.name
        }
        allow
        refused '0x' tpm2_duplicate -C primary.ctx -c key.ctx -G null -p session:policy.ctx \\
            -r no -s none
        allow
        tpm2_duplicate -C parent.ctx -c key.ctx -G null -p session:policy.ctx -r dup -s seed
        tpm2_import -Q -C parent.ctx -u key.pub -i dup -s seed -r moved.priv -L policy
        tpm2_load -Q -C parent.ctx -u key.pub -r moved.priv -c moved.ctx
    """,
    "policylocality": """
        trial
        tpm2_policylocality -Q -S trial.ctx -L policy zero
        by_policy
        policy
        tpm2_policylocality -Q -S policy.ctx zero
        unsealed
        policy
        tpm2_policylocality -Q -S policy.ctx three
        refused '0x' tpm2_unseal -c seal.ctx -p session:policy.ctx
    """,
    "policynamehash": """
        authority
        trial
        tpm2_policyauthorize -Q -S trial.ctx -n authority.name -L half
        tpm2_policycommandcode -Q -S trial.ctx -L policy TPM2_CC_Duplicate
        primary
        tpm2_create -Q -C primary.ctx -G ecc -L policy -a 'sensitivedataorigin|sign' \\
            -u key.pub -r key.priv -c key.ctx
        tpm2_createprimary -Q -C e -G ecc -c parent.ctx
        tpm2_readpublic -Q -c parent.ctx -n parent.name
        tpm2_readpublic -Q -c key.ctx -n key.name
        cat key.name parent.name | openssl dgst -sha256 -binary >name.hash
        trial
        tpm2_policynamehash -Q -S trial.ctx -n name.hash -L names.policy
        approve names.policy
        allow() {
            policy
            tpm2_policynamehash -Q -S policy.ctx -n name.hash
            tpm2_policyauthorize -Q -S policy.ctx -i names.policy -n authority.name -t ticket
            tpm2_policycommandcode -Q -S policy.ctx TPM2_CC_Duplicate
        }
        allow
        refused '0x' tpm2_duplicate -C primary.ctx -c key.ctx -G null -p session:policy.ctx \\
            -r no -s none
        allow
        tpm2_duplicate -C parent.ctx -c key.ctx -G null -p session:policy.ctx -r dup -s seed
    """,
    "policynv": """
        tpm2_nvdefine -Q -C o 0x1500008 -s 2 -a 'ownerread|ownerwrite|authread|policyread'
        printf '\\x30\\x39' >operand
        tpm2_nvwrite -Q -C o 0x1500008 -i operand
        trial
        tpm2_policynv -Q -S trial.ctx -i operand 0x1500008 eq -L policy
        by_policy
        policy
        tpm2_policynv -Q -S policy.ctx -i operand 0x1500008 eq
        unsealed
        printf '\\x30\\x38' | tpm2_nvwrite -Q -C o 0x1500008 -i -
        policy
        refused '0x126' tpm2_policynv -S policy.ctx -i operand 0x1500008 eq
        locked
        tpm2_nvundefine -Q -C o 0x1500008
    """,
    "policynvwritten": """
        trial
        tpm2_policynvwritten -Q -S trial.ctx -L policy c
        tpm2_nvdefine -Q -C o 0x1500009 -s 1 -a 'ownerread|policywrite' -L policy
        policy
        tpm2_policynvwritten -Q -S policy.ctx c
        echo -n 1 | tpm2_nvwrite -Q 0x1500009 -i - -P session:policy.ctx
        policy
        tpm2_policynvwritten -Q -S policy.ctx c
        echo -n 2 >two
        refused '0x' tpm2_nvwrite 0x1500009 -i two -P session:policy.ctx
        [[ $(tpm2_nvread -C o 0x1500009) == 1 ]]
        tpm2_nvundefine -Q -C o 0x1500009
    """,
    "policyor": """
        trial
        tpm2_policypcr -Q -S trial.ctx -l sha256:21 -L one
        trial
        tpm2_policypassword -Q -S trial.ctx -L two
        trial
        tpm2_policyor -Q -S trial.ctx -L policy sha256:one,two
        by_policy
        policy
        tpm2_policypcr -Q -S policy.ctx -l sha256:21
        tpm2_policyor -Q -S policy.ctx sha256:one,two
        tpm2_getpolicydigest -Q -S policy.ctx -o found.policy
        same policy found.policy
        unsealed
        policy
        tpm2_policypcr -Q -S policy.ctx -l sha256:22
        refused '0x' tpm2_policyor -S policy.ctx sha256:one,two
        locked
    """,
    "policypassword": """
        trial
        tpm2_policypassword -Q -S trial.ctx -L policy
        sealed -p word -L policy -a 'fixedtpm|fixedparent'
        policy
        tpm2_policypassword -Q -S policy.ctx
        tpm2_policyrestart -Q -S policy.ctx
        tpm2_policypassword -Q -S policy.ctx
        tpm2_unseal -c seal.ctx -p session:policy.ctx+word >found
        same secret found
        policy
        tpm2_policypassword -Q -S policy.ctx
        tpm2_policyrestart -Q -S policy.ctx
        locked
    """,
    "policypcr": """
        tpm2_pcrreset 23
        tpm2_createpolicy -Q --policy-pcr -l sha256:23 -L policy
        by_policy
        policy
        tpm2_policypcr -Q -S policy.ctx -l sha256:23
        unsealed
        tpm2_pcrextend 23:sha256=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
        policy
        tpm2_policypcr -Q -S policy.ctx -l sha256:23
        locked
        tpm2_pcrreset 23
        policy
        tpm2_policypcr -Q -S policy.ctx -l sha256:23
        unsealed
    """,
    "policysecret": """
        trial
        tpm2_policysecret -Q -S trial.ctx -c o -L policy
        by_policy
        policy
        tpm2_policysecret -Q -S policy.ctx -c o
        unsealed
        policy
        tpm2_policysecret -Q -S policy.ctx -c e
        locked
    """,
    "policysigned": """
        authority
        printf '\\0\\0\\0\\0' | openssl dgst -sha256 -sign authority.key -out signature
        trial
        sign() { tpm2_policysigned -Q -g sha256 -f ecdsa -s signature -c authority.ctx "$@"; }
        sign -S trial.ctx -L policy
        by_policy
        policy
        sign -S policy.ctx
        unsealed
        printf '\\0\\0\\0\\1' | openssl dgst -sha256 -sign authority.key -out signature
        policy
        refused '0x' tpm2_policysigned -g sha256 -f ecdsa -s signature -c authority.ctx \\
            -S policy.ctx
        locked
    """,
    "policytemplate": """
        tpm2_createprimary -Q -C o -G ecc -c one.ctx --template-data template
        openssl dgst -sha256 -binary -out template.hash template
        trial
        tpm2_policytemplate -Q -S trial.ctx -L policy --template-hash template.hash
        tpm2_setprimarypolicy -Q -C o -g sha256 -L policy
        policy
        tpm2_policytemplate -Q -S policy.ctx --template-hash template.hash
        refused '0x' tpm2_createprimary -C o -G rsa -c no.ctx -P session:policy.ctx
        policy
        tpm2_policytemplate -Q -S policy.ctx --template-hash template.hash
        tpm2_createprimary -Q -C o -G ecc -c two.ctx -P session:policy.ctx
        tpm2_readpublic -Q -c one.ctx -n one
        tpm2_readpublic -Q -c two.ctx -n two
        same one two
        tpm2_setprimarypolicy -Q -C o
    """,
    "policyticket": """
        policy
        tpm2_policysecret -Q -S policy.ctx -c o -L policy -x -t -3600 --ticket ticket \\
            --timeout timeout
        by_policy
        printf '\\x40\\0\\0\\1' >owner.name
        printf '\\x40\\0\\0\\x0b' >other.name
        policy
        tpm2_policyticket -Q -S policy.ctx -n owner.name --ticket ticket --timeout timeout
        unsealed
        policy
        refused 'invalid ticket' tpm2_policyticket -S policy.ctx -n other.name \\
            --ticket ticket --timeout timeout
        locked
    """,
}
