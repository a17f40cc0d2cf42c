/* A stand-in for the CUDA driver, for tests on machines without one. It is no GPU: memory is host memory, and kernels are
 * compiled by the C compiler and run on the processor, thread by thread.
 *
 * It is strict where a GPU would be silent or crash:
 * - device addresses are not host addresses: whoever touches one directly crashes;
 * - every range is checked against an allocation, every handle against a table;
 * - work of a stream happens when it is waited for, not before, unless host memory is not pinned;
 * - what was not given back is counted: fake_live() says how much.
 * fake_fail(name, status) lets the next call of that name fail.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* What the CUDA compiler knows by itself. */
#define __align__(n) __attribute__((aligned(n)))
#define __device__ __attribute__((unused))
#define __global__
typedef struct { unsigned x, y, z; } dim;
static _Thread_local dim threadIdx, blockIdx, blockDim, gridDim;
static unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned __int128)a * b >> 64;
}
#include "kernels.cu"

enum { SUCCESS = 0, INVALID = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, BAD_IMAGE = 200, NO_CONTEXT = 201, NOT_FOUND = 500,
       ALREADY_REGISTERED = 712, NOT_REGISTERED = 713 };

#define DEVICES 2
/* Added to host addresses: such an address faults when it is used. */
#define DEVICE_BIT 0x4000000000000000ULL
#define MEMORY_BYTES (1ULL << 30)

typedef struct range {
    struct range *next;
    uint64_t address;
    size_t bytes;
    int mapped_host;
} range;

typedef struct work {
    struct work *next;
    uint64_t number;
    void *to;
    const void *from;
    size_t bytes;
    void (*run)(void **);
    u64 parameters[16];
    dim grid, block;
} work;

typedef struct stream {
    struct stream *next;
    uint64_t posted, done;
    work *first, **last;
} stream;

typedef struct event {
    struct event *next;
    stream *of;
    uint64_t number;
} event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised, retained[DEVICES], modules;
static range *ranges;
static stream *streams;
static event *events;
static _Thread_local int current = -1;
static char failing[64];
static int failing_status;

void fake_fail(const char *call, int status)
{
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof failing, "%s", call);
    failing_status = status;
    pthread_mutex_unlock(&lock);
}

/* Things held: contexts, memory, pinned memory, streams, events, modules. */
int fake_live(void)
{
    int live = modules;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < DEVICES; i++)
        live += retained[i];
    for (range *each = ranges; each; each = each->next)
        live++;
    for (stream *each = streams; each; each = each->next)
        live++;
    for (event *each = events; each; each = each->next)
        live++;
    pthread_mutex_unlock(&lock);
    return live;
}

/* Enters a call: with the lock held, or out with a status. */
static int enter(const char *call, int needs_context)
{
    pthread_mutex_lock(&lock);
    int status = SUCCESS;
    if (strcmp(call, failing) == 0) {
        failing[0] = 0;
        status = failing_status;
    } else if (!initialised)
        status = NOT_INITIALIZED;
    else if (needs_context && (current < 0 || retained[current] == 0))
        status = NO_CONTEXT;
    if (status)
        pthread_mutex_unlock(&lock);
    return status;
}

#define ENTER(needs_context) do { int status = enter(__func__, needs_context); if (status) return status; } while (0)
#define LEAVE(status) do { int left = (status); pthread_mutex_unlock(&lock); return left; } while (0)

static range *find(uint64_t address, size_t bytes)
{
    for (range *each = ranges; each; each = each->next)
        if (address >= each->address && address - each->address <= each->bytes
            && bytes <= each->bytes - (address - each->address))
            return each;
    return NULL;
}

static void add(uint64_t address, size_t bytes, int mapped_host)
{
    range *new = malloc(sizeof *new);
    *new = (range){ ranges, address, bytes, mapped_host };
    ranges = new;
}

static int take_away(uint64_t address)
{
    for (range **at = &ranges; *at; at = &(*at)->next)
        if ((*at)->address == address) {
            range *gone = *at;
            *at = gone->next;
            free(gone);
            return 1;
        }
    return 0;
}

static void *host_of(u64 address)
{
    return address & DEVICE_BIT ? (void *)(uintptr_t)(address & ~DEVICE_BIT) : NULL;
}

/* The kernels, by name: parameters as the driver gets them. */
#define WORD(i) (*(u64 *)parameters[i])
#define AT(i, type) ((type)host_of(WORD(i)))
static void run_groups(void **parameters)
{
    baton_digest_groups(AT(0, u8 *), AT(1, u64 *), AT(2, u64 *), WORD(3), WORD(4), AT(5, u64 *));
}
static void run_lanes(void **parameters)
{
    baton_digest_lanes(AT(0, u64 *), AT(1, u64 *), WORD(2), WORD(3), AT(4, u64 *));
}
static void run_finish(void **parameters)
{
    baton_digest_finish(AT(0, u8 *), AT(1, u64 *), AT(2, u64 *), WORD(3), WORD(4), AT(5, u64 *), AT(6, u64 *));
}
static void run_copy(void **parameters)
{
    baton_copy_blocks(AT(0, u8 *), AT(1, u64 *), AT(2, u8 *), AT(3, u64 *), WORD(4), WORD(5), (u32)WORD(6));
}
static void run_relayout(void **parameters)
{
    baton_relayout(AT(0, u8 *), AT(1, u8 *), AT(2, piece *), WORD(3));
}

static const struct kernel {
    const char *name;
    void (*run)(void **);
    int parameters;
} KERNELS[] = {
    { "baton_digest_groups", run_groups, 6 },
    { "baton_digest_lanes", run_lanes, 5 },
    { "baton_digest_finish", run_finish, 7 },
    { "baton_copy_blocks", run_copy, 7 },
    { "baton_relayout", run_relayout, 4 },
};

static void perform(work *it)
{
    if (!it->run) {
        memcpy(it->to, it->from, it->bytes);
        return;
    }
    void *parameters[16];
    for (int i = 0; i < 16; i++)
        parameters[i] = &it->parameters[i];
    gridDim = it->grid;
    blockDim = it->block;
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                it->run(parameters);
}

static void drain(stream *of, uint64_t upto)
{
    while (of->first && of->first->number <= upto) {
        work *it = of->first;
        of->first = it->next;
        if (!of->first)
            of->last = &of->first;
        perform(it);
        of->done = it->number;
        free(it);
    }
}

static void post(stream *to, work *it)
{
    it->next = NULL;
    it->number = ++to->posted;
    *to->last = it;
    to->last = &it->next;
}

static int known_stream(stream *which)
{
    for (stream *each = streams; each; each = each->next)
        if (each == which)
            return 1;
    return 0;
}

static int known_event(event *which)
{
    for (event *each = events; each; each = each->next)
        if (each == which)
            return 1;
    return 0;
}

int cuInit(unsigned flags)
{
    initialised = 1;
    return flags == 0 ? SUCCESS : INVALID;
}

int cuDriverGetVersion(int *version)
{
    ENTER(0);
    *version = 12040;
    LEAVE(SUCCESS);
}

int cuGetErrorName(int status, const char **name)
{
    switch (status) {
    case NO_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case 719: *name = "CUDA_ERROR_LAUNCH_FAILED"; return SUCCESS;
    case NO_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; return SUCCESS;
    case INVALID: *name = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
    default: return INVALID;
    }
}

int cuDeviceGetCount(int *count)
{
    ENTER(0);
    *count = DEVICES;
    LEAVE(SUCCESS);
}

int cuDeviceGet(int *device, int ordinal)
{
    ENTER(0);
    *device = ordinal;
    LEAVE(ordinal >= 0 && ordinal < DEVICES ? SUCCESS : INVALID);
}

int cuDeviceGetName(char *name, int len, int device)
{
    ENTER(0);
    snprintf(name, len, "Fake GPU %d", device);
    LEAVE(SUCCESS);
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    ENTER(0);
    *bytes = MEMORY_BYTES;
    LEAVE(device < DEVICES ? SUCCESS : INVALID);
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    ENTER(0);
    int status = device < DEVICES ? SUCCESS : INVALID;
    switch (attribute) {
    case 16: *value = 4; break;   /* multiprocessors */
    case 40: *value = 2; break;   /* copy engines */
    case 75: *value = 8; break;   /* compute capability */
    case 76: *value = 0; break;
    case 116: *value = 1; break;  /* GPUDirect RDMA */
    case 124: *value = device == 0; break; /* dma-buf */
    default: status = INVALID;
    }
    LEAVE(status);
}

int cuDeviceCanAccessPeer(int *can, int device, int peer)
{
    ENTER(0);
    *can = device == 0 && peer == 1;
    LEAVE(SUCCESS);
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    ENTER(0);
    retained[device]++;
    *context = (void *)(uintptr_t)(device + 1);
    LEAVE(SUCCESS);
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    ENTER(0);
    retained[device]--;
    LEAVE(SUCCESS);
}

int cuCtxSetCurrent(void *context)
{
    ENTER(0);
    current = (int)(uintptr_t)context - 1;
    LEAVE(current >= 0 && current < DEVICES && retained[current] ? SUCCESS : NO_CONTEXT);
}

static int allocate(size_t bytes, void **memory)
{
    size_t whole = (bytes + 4095) / 4096 * 4096;
    if (bytes == 0 || bytes > MEMORY_BYTES)
        return NO_MEMORY;
    void *new = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (new == MAP_FAILED)
        return NO_MEMORY;
    *memory = new;
    return SUCCESS;
}

int cuMemAlloc_v2(u64 *address, size_t bytes)
{
    ENTER(1);
    void *memory;
    int status = allocate(bytes, &memory);
    if (status == SUCCESS) {
        memset(memory, 0xa5, bytes);
        *address = (uintptr_t)memory | DEVICE_BIT;
        add(*address, bytes, 0);
    }
    LEAVE(status);
}

int cuMemFree_v2(u64 address)
{
    ENTER(1);
    range *which = find(address, 1);
    if (!which || which->address != address || which->mapped_host)
        LEAVE(INVALID);
    for (stream *each = streams; each; each = each->next)
        drain(each, UINT64_MAX);
    munmap(host_of(address), which->bytes);
    take_away(address);
    LEAVE(SUCCESS);
}

int cuMemsetD8_v2(u64 address, unsigned char value, size_t bytes)
{
    ENTER(1);
    if (!find(address, bytes))
        LEAVE(INVALID);
    memset(host_of(address), value, bytes);
    LEAVE(SUCCESS);
}

static int copy(void *to, const void *from, size_t bytes, const void *host, stream *on)
{
    if (!known_stream(on))
        return INVALID;
    work *it = calloc(1, sizeof *it);
    *it = (work){ .to = to, .from = from, .bytes = bytes };
    post(on, it);
    range *pinned = find((uintptr_t)host | DEVICE_BIT, bytes);
    if (!pinned || !pinned->mapped_host)
        drain(on, on->posted);
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t bytes, stream *on)
{
    ENTER(1);
    LEAVE(find(to, bytes) ? copy(host_of(to), from, bytes, from, on) : INVALID);
}

int cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t bytes, stream *on)
{
    ENTER(1);
    LEAVE(find(from, bytes) ? copy(to, host_of(from), bytes, to, on) : INVALID);
}

int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    ENTER(1);
    int status = flags & 2 ? allocate(bytes, memory) : INVALID;
    if (status == SUCCESS)
        add((uintptr_t)*memory | DEVICE_BIT, bytes, 1);
    LEAVE(status);
}

int cuMemFreeHost(void *memory)
{
    ENTER(1);
    LEAVE(take_away((uintptr_t)memory | DEVICE_BIT) ? SUCCESS : INVALID);
}

int cuMemHostRegister_v2(void *memory, size_t bytes, unsigned flags)
{
    ENTER(1);
    u64 address = (uintptr_t)memory | DEVICE_BIT;
    if (find(address, 1) || !(flags & 2))
        LEAVE(ALREADY_REGISTERED);
    add(address, bytes, 1);
    LEAVE(SUCCESS);
}

int cuMemHostUnregister(void *memory)
{
    ENTER(1);
    for (stream *each = streams; each; each = each->next)
        drain(each, UINT64_MAX);
    LEAVE(take_away((uintptr_t)memory | DEVICE_BIT) ? SUCCESS : NOT_REGISTERED);
}

int cuMemHostGetDevicePointer_v2(u64 *mapped, void *memory, unsigned flags)
{
    ENTER(1);
    *mapped = (uintptr_t)memory | DEVICE_BIT;
    range *which = find(*mapped, 1);
    LEAVE(which && which->mapped_host && flags == 0 ? SUCCESS : INVALID);
}

int cuPointerSetAttribute(const void *value, int attribute, u64 address)
{
    ENTER(1);
    LEAVE(attribute == 6 && *(const unsigned *)value == 1 && find(address, 1) ? SUCCESS : INVALID);
}

int cuMemGetHandleForAddressRange(void *handle, u64 address, size_t bytes, int kind, u64 flags)
{
    ENTER(1);
    range *which = find(address, bytes);
    if (!which || kind != 1 || flags != 0 || address % 4096 || bytes % 4096)
        LEAVE(INVALID);
    int file = memfd_create("fake dma-buf", MFD_CLOEXEC);
    *(int *)handle = file;
    LEAVE(file >= 0 && ftruncate(file, bytes) == 0 ? SUCCESS : INVALID);
}

int cuStreamCreate(stream **new, unsigned flags)
{
    ENTER(1);
    stream *made = calloc(1, sizeof *made);
    made->last = &made->first;
    made->next = streams;
    streams = made;
    *new = made;
    LEAVE(flags == 1 ? SUCCESS : INVALID);
}

int cuStreamDestroy_v2(stream *which)
{
    ENTER(1);
    if (!known_stream(which))
        LEAVE(INVALID);
    drain(which, UINT64_MAX);
    for (stream **at = &streams; *at; at = &(*at)->next)
        if (*at == which) {
            *at = which->next;
            break;
        }
    for (event *each = events; each; each = each->next)
        if (each->of == which)
            each->of = NULL;
    free(which);
    LEAVE(SUCCESS);
}

int cuStreamSynchronize(stream *which)
{
    ENTER(1);
    if (which && !known_stream(which))
        LEAVE(INVALID);
    if (which)
        drain(which, UINT64_MAX);
    LEAVE(SUCCESS);
}

int cuEventCreate(event **new, unsigned flags)
{
    ENTER(1);
    event *made = calloc(1, sizeof *made);
    made->next = events;
    events = made;
    *new = made;
    LEAVE(flags == 3 ? SUCCESS : INVALID);
}

int cuEventDestroy_v2(event *which)
{
    ENTER(1);
    for (event **at = &events; *at; at = &(*at)->next)
        if (*at == which) {
            *at = which->next;
            free(which);
            LEAVE(SUCCESS);
        }
    LEAVE(INVALID);
}

int cuEventRecord(event *which, stream *on)
{
    ENTER(1);
    if (!known_event(which) || !known_stream(on))
        LEAVE(INVALID);
    which->of = on;
    which->number = on->posted;
    LEAVE(SUCCESS);
}

int cuEventSynchronize(event *which)
{
    ENTER(1);
    if (!known_event(which))
        LEAVE(INVALID);
    if (which->of)
        drain(which->of, which->number);
    LEAVE(SUCCESS);
}

int cuModuleLoadData(void **module, const void *image)
{
    ENTER(1);
    /* What the stand-in for the compiler makes. */
    if (strncmp(image, "fake image", 10) != 0 && strstr(image, "baton_digest_groups") == NULL)
        LEAVE(BAD_IMAGE);
    modules++;
    *module = (void *)1;
    LEAVE(SUCCESS);
}

int cuModuleUnload(void *module)
{
    ENTER(1);
    modules--;
    LEAVE(module ? SUCCESS : INVALID);
}

int cuModuleGetFunction(const struct kernel **function, void *module, const char *name)
{
    ENTER(1);
    for (size_t i = 0; module && i < sizeof KERNELS / sizeof *KERNELS; i++)
        if (strcmp(name, KERNELS[i].name) == 0) {
            *function = &KERNELS[i];
            LEAVE(SUCCESS);
        }
    LEAVE(NOT_FOUND);
}

int cuLaunchKernel(const struct kernel *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, stream *on, void **parameters, void **extra)
{
    ENTER(1);
    if (!known_stream(on) || grid_z != 1 || block_y != 1 || block_z != 1 || shared || extra || !grid_x || grid_y > 65535
        || !grid_y || block_x > 1024)
        LEAVE(INVALID);
    work *it = calloc(1, sizeof *it);
    it->run = function->run;
    it->grid = (dim){ grid_x, grid_y, 1 };
    it->block = (dim){ block_x, 1, 1 };
    for (int i = 0; i < function->parameters; i++) {
        it->parameters[i] = *(u64 *)parameters[i];
        if (it->parameters[i] & DEVICE_BIT && !find(it->parameters[i], 1)) {
            free(it);
            LEAVE(INVALID);
        }
    }
    post(on, it);
    LEAVE(SUCCESS);
}
