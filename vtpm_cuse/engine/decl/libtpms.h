/* What we call in libtpms.so.0, 0.9 and later.
   Source: libtpms/tpm_library.h, tpm_error.h, tpm_types.h (libtpms-dev). */

typedef uint32_t TPM_RESULT;
typedef unsigned char TPM_BOOL;

struct libtpms_callbacks {
    int sizeOfStruct;
    TPM_RESULT (*tpm_nvram_init)(void);
    TPM_RESULT (*tpm_nvram_loaddata)(unsigned char **data, uint32_t *length,
                                     uint32_t tpm_number, const char *name);
    TPM_RESULT (*tpm_nvram_storedata)(const unsigned char *data, uint32_t length,
                                      uint32_t tpm_number, const char *name);
    TPM_RESULT (*tpm_nvram_deletename)(uint32_t tpm_number, const char *name, TPM_BOOL mustExist);
    TPM_RESULT (*tpm_io_init)(void);
    TPM_RESULT (*tpm_io_getlocality)(uint32_t *localityModifier, uint32_t tpm_number);
    TPM_RESULT (*tpm_io_getphysicalpresence)(TPM_BOOL *physicalPresence, uint32_t tpm_number);
};

uint32_t TPMLIB_GetVersion(void);
TPM_RESULT TPMLIB_ChooseTPMVersion(int ver);
TPM_RESULT TPMLIB_GetTPMProperty(int prop, int *result);
TPM_RESULT TPMLIB_RegisterCallbacks(struct libtpms_callbacks *callbacks);
TPM_RESULT TPMLIB_MainInit(void);
void TPMLIB_Terminate(void);
TPM_RESULT TPMLIB_Process(unsigned char **respbuffer, uint32_t *resp_size, uint32_t *respbufsize,
                          unsigned char *command, uint32_t command_size);
TPM_RESULT TPMLIB_CancelCommand(void);
TPM_RESULT TPMLIB_VolatileAll_Store(unsigned char **buffer, uint32_t *buflen);
char *TPMLIB_GetInfo(int flags);
uint32_t TPMLIB_SetBufferSize(uint32_t wanted_size, uint32_t *min_size, uint32_t *max_size);
TPM_RESULT TPMLIB_SetState(int st, const unsigned char *buffer, uint32_t buflen);

void TPMLIB_SetDebugFD(int fd);
void TPMLIB_SetDebugLevel(unsigned level);
TPM_RESULT TPMLIB_SetDebugPrefix(const char *prefix);

TPM_RESULT TPM_IO_Hash_Start(void);
TPM_RESULT TPM_IO_Hash_Data(const unsigned char *data, uint32_t data_length);
TPM_RESULT TPM_IO_Hash_End(void);
TPM_RESULT TPM_IO_TpmEstablished_Get(TPM_BOOL *tpmEstablished);
TPM_RESULT TPM_IO_TpmEstablished_Reset(void);

/* Since libtpms 0.10; looked up at run time. */
TPM_RESULT TPMLIB_SetProfile(const char *profile);
_Bool TPMLIB_WasManufactured(void);

/* libc, the allocator that libtpms frees and expects us to free with. */
void *malloc(size_t size);
void free(void *ptr);
