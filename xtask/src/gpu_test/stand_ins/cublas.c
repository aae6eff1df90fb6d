/* Handles of cuBLAS that can be made, given a stream and a workspace, and destroyed. Nothing computes. */
#include <stddef.h>
#include <stdlib.h>

enum { SUCCESS = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7 };

int cublasCreate_v2(void **handle) {
    if (!handle) return INVALID_VALUE;
    *handle = malloc(1);
    return *handle ? SUCCESS : ALLOC_FAILED;
}

int cublasDestroy_v2(void *handle) {
    if (!handle) return NOT_INITIALIZED;
    free(handle);
    return SUCCESS;
}

int cublasSetStream_v2(void *handle, void *stream) {
    (void)stream;
    return handle ? SUCCESS : NOT_INITIALIZED;
}

int cublasSetWorkspace_v2(void *handle, void *workspace, size_t bytes) {
    (void)workspace;
    (void)bytes;
    return handle ? SUCCESS : NOT_INITIALIZED;
}
