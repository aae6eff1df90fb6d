/* A program that is linked against stubs, as the facade's are. The codes that it wants are those of
 * the test that runs it. */
int cuInit(unsigned);
int cuMemPrefetch(void);
int cublasCreate_v2(void **);
int cublasDestroy_v2(void *);
int cublasSgemm_v2(void);
const char *cublasGetStatusString(int);

int main(void) {
    void *handle = 0;
    if (cuInit(7) != 42) return 1;
    if (cuMemPrefetch() != 801) return 2;
    if (cublasCreate_v2(&handle) || !handle || cublasDestroy_v2(handle)) return 3;
    if (cublasSgemm_v2() != 15) return 4;
    return cublasGetStatusString(1)[0] != 'a';
}
