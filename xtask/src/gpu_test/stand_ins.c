/* Handles of cuBLAS and generators of cuRAND that can be made, given a stream and the like, and destroyed; nothing computes.
   And what runs before main and after it in programs that have kernels compiled in; no kernel is ever found. */
#include <stddef.h>
#include <stdlib.h>

enum { SUCCESS = 0 };
enum { CUBLAS_NOT_INITIALIZED = 1, CUBLAS_ALLOC_FAILED = 3, CUBLAS_INVALID_VALUE = 7 };
enum { CURAND_NOT_INITIALIZED = 101, CURAND_ALLOCATION_FAILED = 102 };

static int make(void **handle, int no_place, int no_memory) {
    if (!handle) return no_place;
    *handle = malloc(1);
    return *handle ? SUCCESS : no_memory;
}

static int destroy(void *handle, int no_handle) {
    if (!handle) return no_handle;
    free(handle);
    return SUCCESS;
}

#define SET(call, type, no_handle) \
    int call(void *handle, type value) { (void)value; return handle ? SUCCESS : no_handle; }

int cublasCreate_v2(void **handle) { return make(handle, CUBLAS_INVALID_VALUE, CUBLAS_ALLOC_FAILED); }
int cublasDestroy_v2(void *handle) { return destroy(handle, CUBLAS_NOT_INITIALIZED); }
SET(cublasSetStream_v2, void *, CUBLAS_NOT_INITIALIZED)
int cublasSetWorkspace_v2(void *handle, void *workspace, size_t bytes) {
    (void)workspace;
    (void)bytes;
    return handle ? SUCCESS : CUBLAS_NOT_INITIALIZED;
}

int curandCreateGenerator(void **generator, int kind) {
    (void)kind;
    return make(generator, CURAND_NOT_INITIALIZED, CURAND_ALLOCATION_FAILED);
}
int curandDestroyGenerator(void *generator) { return destroy(generator, CURAND_NOT_INITIALIZED); }
SET(curandSetStream, void *, CURAND_NOT_INITIALIZED)
SET(curandSetPseudoRandomGeneratorSeed, unsigned long long, CURAND_NOT_INITIALIZED)

static void *registered;
void **__cudaRegisterFatBinary(void *binary) {
    (void)binary;
    return &registered;
}
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
