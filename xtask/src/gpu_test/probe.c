/* Asks the CUDA driver whether a GPU answers. Exit code 0: yes, and lines "key=value" say which;
   2: there is no driver library, or it reports no device; 1: the driver fails. */
#include <dlfcn.h>
#include <stdio.h>

enum { NO_DEVICE = 100 };

static int fail(const char *call, int code) {
    printf("reason=%s answered code %d\n", call, code);
    return 1;
}

int main(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        printf("reason=no driver library: %s\n", dlerror());
        return 2;
    }
    int (*init)(unsigned) = (int (*)(unsigned))dlsym(library, "cuInit");
    int (*version)(int *) = (int (*)(int *))dlsym(library, "cuDriverGetVersion");
    int (*count)(int *) = (int (*)(int *))dlsym(library, "cuDeviceGetCount");
    int (*get)(int *, int) = (int (*)(int *, int))dlsym(library, "cuDeviceGet");
    int (*name)(char *, int, int) = (int (*)(char *, int, int))dlsym(library, "cuDeviceGetName");
    if (!init || !version || !count || !get || !name) {
        printf("reason=libcuda.so.1 lacks the entry points of a CUDA driver\n");
        return 1;
    }
    int code = init(0);
    if (code == NO_DEVICE) {
        printf("reason=the driver reports no GPU\n");
        return 2;
    }
    if (code) return fail("cuInit", code);
    int number = 0, devices = 0, device = 0;
    char text[256] = "";
    if ((code = version(&number))) return fail("cuDriverGetVersion", code);
    if ((code = count(&devices))) return fail("cuDeviceGetCount", code);
    if (devices == 0) {
        printf("reason=the driver reports no GPU\n");
        return 2;
    }
    if ((code = get(&device, 0))) return fail("cuDeviceGet", code);
    if ((code = name(text, (int)sizeof text, device))) return fail("cuDeviceGetName", code);
    printf("cuda=%d.%d\ndevices=%d\nname=%s\n", number / 1000, number % 1000 / 10, devices, text);
    return 0;
}
