/* fake_cuda.c - to be preloaded where there is no GPU: a CUDA runtime with one device, as far as the
 * program asks before it computes. FAKE_CUDA: "old", its driver is; "arch", it cannot run the program's
 * kernels. */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

static int is(const char *what) {
    const char *mode = getenv("FAKE_CUDA");
    return mode && !strcmp(mode, what);
}

cudaError_t cudaGetDeviceCount(int *count) {
    return *count = 1, is("old") ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = is("old") ? 11040 : 13000, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    return *unused = 1000000000, *total = 2000000000, cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "Test GPU");
    p->major = 7, p->minor = 5, p->totalGlobalMem = 2000000000;
    return cudaSetDevice(device);
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    return strncpy(id, "00000000:3B:00.0", (size_t)length), cudaSetDevice(device);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
    (void)a, (void)function;
    return is("arch") ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
