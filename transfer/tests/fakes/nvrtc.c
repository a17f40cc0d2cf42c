/* A stand-in for the CUDA compiler, for tests on machines without one: its images name no code, and only the stand-in for
 * the driver takes them. */
#include <stdlib.h>
#include <string.h>

typedef struct { int compiled; } program;
static const char IMAGE[] = "fake image";

int nvrtcVersion(int *major, int *minor)
{
    *major = 12;
    *minor = 4;
    return 0;
}

int nvrtcCreateProgram(program **new, const char *source, const char *name, int headers, const char *const *sources,
                       const char *const *names)
{
    if (!strstr(source, "baton_digest_groups") || !name || headers || sources || names)
        return 3;
    *new = calloc(1, sizeof **new);
    return 0;
}

int nvrtcDestroyProgram(program **which)
{
    free(*which);
    *which = NULL;
    return 0;
}

int nvrtcCompileProgram(program *which, int count, const char *const *options)
{
    which->compiled = count == 1 && strcmp(options[0], "--gpu-architecture=sm_80") == 0;
    return which->compiled ? 0 : 5;
}

int nvrtcGetProgramLogSize(program *which, size_t *bytes)
{
    *bytes = which ? 1 : 0;
    return 0;
}

int nvrtcGetProgramLog(program *which, char *log)
{
    *log = 0;
    return which ? 0 : 4;
}

int nvrtcGetNumSupportedArchs(int *count)
{
    *count = 3;
    return 0;
}

int nvrtcGetSupportedArchs(int *architectures)
{
    architectures[0] = 70;
    architectures[1] = 80;
    architectures[2] = 90;
    return 0;
}

int nvrtcGetCUBINSize(program *which, size_t *bytes)
{
    *bytes = sizeof IMAGE;
    return which->compiled ? 0 : 4;
}

int nvrtcGetCUBIN(program *which, char *image)
{
    memcpy(image, IMAGE, sizeof IMAGE);
    return which->compiled ? 0 : 4;
}

int nvrtcGetPTXSize(program *which, size_t *bytes)
{
    return nvrtcGetCUBINSize(which, bytes);
}

int nvrtcGetPTX(program *which, char *image)
{
    return nvrtcGetCUBIN(which, image);
}
