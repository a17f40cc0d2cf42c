/*
 * The example driver under the sanitizers of the compiler: two drivers in one process, random operations, and datagrams
 * of random bytes to the socket of one of them. Exits with 0, or is stopped by a sanitizer or an assertion.
 */
#include "../example/baton_cma.c"

#include <assert.h>

#define LEN (1u << 20)
#define ROUNDS 100
#define STEPS 300

static uint64_t state = 88172645463325252ull;

static uint64_t below(uint64_t limit) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull % limit;
}

struct side { baton_driver *driver; uint8_t *memory; uint64_t registration; baton_blob key; uint8_t key_bytes[BATON_KEY_MAX]; };

static void start(struct side *side, uint32_t access) {
    baton_error error = {0};
    baton_open_options options = {sizeof options, 0, NULL};
    assert(!cma_open(&options, &side->driver, &error));
    side->memory = malloc(LEN);
    for (unsigned i = 0; i < LEN; i++) side->memory[i] = (uint8_t)(i * 7 + access);
    baton_memory memory = {(uintptr_t)side->memory, LEN, BATON_PLACE_HOST, 0, -1, 0, 0};
    side->key = (baton_blob){side->key_bytes, sizeof side->key_bytes, 0};
    assert(!cma_register(side->driver, &memory, access, &side->registration, &side->key, &error));
}

/* A datagram of random bytes, or one of a writer that has a good key and lies in all else. */
static void garbage(struct side *user, struct side *owner, struct peer *peer) {
    struct packet packet;
    uint8_t *bytes = (uint8_t *)&packet, rest[200];
    for (unsigned i = 0; i < sizeof packet; i++) bytes[i] = (uint8_t)below(256);
    memset(rest, 0x5a, sizeof rest);
    packet.kind = (uint32_t)below(5);
    packet.tag = below(400);
    if (below(2)) memcpy(&packet.key, owner->key_bytes, sizeof packet.key);
    if (below(2)) packet.len = below(4096), packet.to = below(2 * LEN), packet.from = (uintptr_t)user->memory;
    send_packet(user->driver, &peer->at, &packet, rest, below(sizeof rest));
    sendto(user->driver->socket, rest, below(100), MSG_DONTWAIT, (struct sockaddr *)&peer->at, NAME_LEN);
}

static unsigned poll_once(struct side *side) {
    baton_done done[64];
    uint32_t count;
    cma_poll(side->driver, done, 64, &count);
    return count;
}

int main(void) {
    for (int round = 0; round < ROUNDS; round++) {
        struct side user, owner;
        uint8_t address_bytes[BATON_ADDRESS_MAX];
        baton_blob address = {address_bytes, sizeof address_bytes, 0};
        baton_error error = {0};
        uint64_t peer, key, op = 1;
        unsigned posted = 0;
        start(&user, BATON_ACCESS_LOCAL);
        start(&owner, BATON_ACCESS_REMOTE_WRITE);
        assert(!cma_address(owner.driver, &address, &error));
        assert(!cma_connect(user.driver, address_bytes, address.len, &peer, &error));
        assert(!cma_import(user.driver, peer, owner.key_bytes, owner.key.len, &key, &error));
        for (int step = 0; step < STEPS; step++, op++) {
            uint64_t len = 1 + below(70000);
            baton_remote remote = {peer, key, below(LEN + 100)};
            baton_local here = {user.registration, below(LEN - len), len}, there = {owner.registration, below(LEN - len), len};
            baton_status status = BATON_FAILED;
            switch (below(6)) {
            case 0: case 1: status = cma_read(user.driver, &remote, &here, op, &error); break;
            case 2: status = cma_write(user.driver, &remote, &here, op, &error); break;
            case 3: if (len <= MESSAGE_MAX) status = cma_send(user.driver, peer, below(20), &here, op, &error); break;
            case 4: cma_receive(owner.driver, below(20), &there, op, &error); break;
            default: garbage(&user, &owner, (struct peer *)(uintptr_t)peer);
            }
            posted += status == BATON_OK;
            if (!below(3)) poll_once(&owner);
            if (!below(3)) posted -= poll_once(&user);
            if (!below(50)) cma_cancel(owner.driver, below(op));
        }
        for (int turn = 0; turn < 10000 && posted; turn++) poll_once(&owner), posted -= poll_once(&user);
        assert(posted == 0); /* every operation was reported once */
        if (round % 2) cma_forget(user.driver, peer, key);
        if (round % 3) cma_disconnect(user.driver, peer);
        if (round % 5 == 0) cma_deregister(user.driver, user.registration);
        struct side *first = round % 7 ? &user : &owner, *second = round % 7 ? &owner : &user;
        cma_close(first->driver);
        poll_once(second);
        cma_close(second->driver);
        free(user.memory), free(owner.memory);
    }
    return 0;
}
