/* Asks the CUDA driver whether a GPU answers. Exit code 0: yes, and lines "key=value" say which;
   2: there is no driver library, or it reports no device; 1: the driver fails. */
#include <dlfcn.h>
#include <stdio.h>

enum { NO_DEVICE = 100 };

/* Ends the program unless the driver has this function and it succeeds. */
#define CALL(name, types, ...)                                                  \
    do {                                                                        \
        int(*function) types = (int(*) types)dlsym(library, name);              \
        int code = function ? function(__VA_ARGS__) : -1;                       \
        if (code == NO_DEVICE) return no_gpu();                                 \
        if (code) return printf("reason=%s answered code %d\n", name, code), 1; \
    } while (0)

static int no_gpu(void) {
    printf("reason=the driver reports no GPU\n");
    return 2;
}

int main(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        printf("reason=no driver library: %s\n", dlerror());
        return 2;
    }
    int version = 0, devices = 0, device = 0;
    char name[256] = "";
    CALL("cuInit", (unsigned), 0);
    CALL("cuDriverGetVersion", (int *), &version);
    CALL("cuDeviceGetCount", (int *), &devices);
    if (devices == 0) return no_gpu();
    CALL("cuDeviceGet", (int *, int), &device, 0);
    CALL("cuDeviceGetName", (char *, int, int), name, (int)sizeof name, device);
    printf("cuda=%d.%d\ndevices=%d\nname=%s\n", version / 1000, version % 1000 / 10, devices, name);
    return 0;
}
