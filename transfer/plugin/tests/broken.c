/* The example driver with one thing wrong: which one, the build says (-DWRONG_...). */
#pragma GCC diagnostic ignored "-Wunused-function"
#define baton_driver_v1 honest_v1
#include "../example/baton_cma.c"
#undef baton_driver_v1

static baton_driver_table table;

static void fill(char *text, size_t size) { memset(text, 'x', size); } /* no NUL anywhere */

#if defined(WRONG_OPEN_FAILS)
static baton_status wrong_open(const baton_open_options *options, baton_driver **driver, baton_error *error) {
    (void)options;
    *driver = (baton_driver *)8; /* an output of a failed call: nobody may use it */
    fill(error->what, sizeof error->what);
    fill(error->remedy, sizeof error->remedy);
    return BATON_FAILED;
}
#elif defined(WRONG_OPEN_NULL)
static baton_status wrong_open(const baton_open_options *options, baton_driver **driver, baton_error *error) {
    (void)options, (void)driver, (void)error;
    return BATON_OK;
}
#elif defined(WRONG_SIGNALS)
#include <signal.h>
static void swallow(int signal) { (void)signal; }
static baton_status wrong_open(const baton_open_options *options, baton_driver **driver, baton_error *error) {
    signal(SIGTERM, swallow);
    signal(SIGSEGV, swallow);
    return cma_open(options, driver, error);
}
#elif defined(WRONG_OPEN_STATUS)
static baton_status wrong_open(const baton_open_options *options, baton_driver **driver, baton_error *error) {
    (void)options, (void)driver, (void)error;
    return -7;
}
#else
#define wrong_open cma_open
#endif

static baton_status wrong_info(baton_driver *driver, baton_info *info, baton_error *error) {
    cma_info(driver, info, error);
#if defined(WRONG_INFO_WIRE)
    strcpy(info->wire, "two words\n");
#elif defined(WRONG_INFO_NO_WIRE)
    info->wire[0] = 0;
#elif defined(WRONG_INFO_OP_MAX)
    info->op_max = 7;
#elif defined(WRONG_INFO_MESSAGE_MAX)
    info->message_max = UINT64_MAX;
#elif defined(WRONG_INFO_RAILS)
    info->rails = 0;
#elif defined(WRONG_INFO_NAP)
    info->nap_us = UINT32_MAX;
#elif defined(WRONG_INFO_NOTHING)
    info->flags = 0, info->message_max = 0;
#elif defined(WRONG_INFO_TEXT)
    fill(info->detail, sizeof info->detail);
    info->detail[0] = 27, info->detail[1] = '\n', info->detail[2] = (char)0xff;
    info->op_max = UINT64_MAX;
#endif
    return BATON_OK;
}

static baton_status wrong_address(baton_driver *driver, baton_blob *address, baton_error *error) {
    baton_status status = cma_address(driver, address, error);
#if defined(WRONG_ADDRESS_LONG)
    address->len = address->room + 1;
#elif defined(WRONG_ADDRESS_EMPTY)
    address->len = 0;
#endif
    return status;
}

static baton_status wrong_register(baton_driver *driver, const baton_memory *memory, uint32_t access, uint64_t *handle,
                                   baton_blob *key, baton_error *error) {
    baton_status status = cma_register(driver, memory, access, handle, key, error);
#if defined(WRONG_KEY_LONG)
    key->len = UINT64_MAX;
#elif defined(WRONG_KEY_EMPTY)
    key->len = 0;
#endif
    return status;
}

static baton_status wrong_read(baton_driver *driver, const baton_remote *from, const baton_local *to, uint64_t op,
                               baton_error *error) {
    baton_status status = cma_read(driver, from, to, op, error);
#if defined(WRONG_STATUS)
    status = 99;
#elif defined(WRONG_OP_BEFORE_POSTED)
    driver->done->id += 1; /* the end of an operation that will be posted next */
#endif
    return status;
}

static int32_t wrong_poll(baton_driver *driver, baton_done *done, uint32_t room, uint32_t *count) {
    int32_t happened = cma_poll(driver, done, room, count);
#if defined(WRONG_OP_UNKNOWN)
    if (*count) done[0].op ^= 1ull << 63;
#elif defined(WRONG_OP_TWICE)
    if (*count) done[*count] = done[*count - 1], ++*count;
#elif defined(WRONG_OP_TWICE_LATER)
    static baton_done last;
    if (*count) last = done[0];
    else if (last.op) done[(*count)++] = last, last.op = 0;
#elif defined(WRONG_BYTES_MORE)
    if (*count) done[0].bytes++;
#elif defined(WRONG_BYTES_FEWER)
    if (*count) done[0].bytes--;
#elif defined(WRONG_COUNT)
    *count = room + 1;
#elif defined(WRONG_COUNT_UNWRITTEN)
    if (*count) ++*count;
#elif defined(WRONG_WHY)
    if (*count) done[0].status = 1234, fill(done[0].why, sizeof done[0].why), done[0].why[0] = 27;
#endif
    return happened;
}

static int32_t wrong_wait_fd(baton_driver *driver) {
#if defined(WRONG_FD)
    return (void)driver, 987654;
#elif defined(WRONG_FD_NEGATIVE)
    return (void)driver, -2;
#else
    return cma_wait_fd(driver);
#endif
}

#if !defined(WRONG_SYMBOL)
#define honest_entry baton_driver_v1
#else
#define honest_entry baton_driver_v0
#endif

__attribute__((visibility("default"))) const baton_driver_table *honest_entry(void) {
    table = *honest_v1();
    table.open = wrong_open, table.info = wrong_info, table.address = wrong_address;
    table.register_memory = wrong_register, table.read = wrong_read, table.poll = wrong_poll;
    table.wait_fd = wrong_wait_fd;
#if defined(WRONG_TABLE)
    return 0;
#elif defined(WRONG_TABLE_UNALIGNED)
    return (const baton_driver_table *)((const char *)&table + 1);
#elif defined(WRONG_VERSION)
    table.abi_version = 2;
#elif defined(WRONG_SIZE_SMALL)
    table.size = 8;
#elif defined(WRONG_SIZE_HUGE)
    table.size = UINT32_MAX;
#elif defined(WRONG_FUNCTION_POLL)
    table.poll = 0;
#elif defined(WRONG_FUNCTION_WAIT_FD)
    table.wait_fd = 0;
#endif
    return &table;
}
