/* Generators of cuRAND that can be made, given a stream and a seed, and destroyed. Nothing is generated. */
#include <stdlib.h>

enum { SUCCESS = 0, NOT_INITIALIZED = 101, ALLOCATION_FAILED = 102 };

int curandCreateGenerator(void **generator, int kind) {
    (void)kind;
    if (!generator) return NOT_INITIALIZED;
    *generator = malloc(1);
    return *generator ? SUCCESS : ALLOCATION_FAILED;
}

int curandDestroyGenerator(void *generator) {
    if (!generator) return NOT_INITIALIZED;
    free(generator);
    return SUCCESS;
}

int curandSetStream(void *generator, void *stream) {
    (void)stream;
    return generator ? SUCCESS : NOT_INITIALIZED;
}

int curandSetPseudoRandomGeneratorSeed(void *generator, unsigned long long seed) {
    (void)seed;
    return generator ? SUCCESS : NOT_INITIALIZED;
}
