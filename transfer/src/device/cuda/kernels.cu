/* What a GPU does with KV blocks in its memory: copies, re-layouts, xxh3-64 digests.
 *
 * Compiled at run time. Every thread works alone: no shared memory, no barriers, so that the same source compiles as plain
 * C and is tested on machines without a GPU.
 *
 * A digest of more than 240 bytes takes three launches, because only the last step of each group of 16 stripes (the
 * scramble) depends on the group before it:
 *   baton_digest_groups  sums the stripes of every group on its own      block x group x lane threads
 *   baton_digest_lanes   folds the sums of a lane, with the scrambles    block x lane threads
 *   baton_digest_finish  takes the last stripe and merges the lanes      block threads
 * Shorter blocks need only the last one.
 *
 * Source: xxhash specification 0.2.0, section XXH3; the host's own code in digest/kernel.rs.
 */

#ifdef __cplusplus
extern "C" {
#endif

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

typedef struct __align__(16) {
    u64 low, high;
} u128;

#define STRIPE 64
#define LANES 8
#define STRIPES_PER_GROUP 16
#define SHORT_BYTES 240

#define PRIME32_1 0x9E3779B1ULL
#define PRIME32_2 0x85EBCA77ULL
#define PRIME32_3 0xC2B2AE3DULL
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define PRIME64_3 0x165667B19E3779F9ULL
#define PRIME64_4 0x85EBCA77C2B2AE63ULL
#define PRIME64_5 0x27D4EB2F165667C5ULL
#define PRIME_MX1 0x165667919E3779F9ULL
#define PRIME_MX2 0x9FB21C651E98DF25ULL

/* The default secret as little-endian words. */
__device__ static const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ULL, 0x1cad21f72c81017cULL, 0xdb979083e96dd4deULL, 0x1f67b3b7a4a44072ULL,
    0x78e5c0cc4ee679cbULL, 0x2172ffcc7dd05a82ULL, 0x8e2443f7744608b8ULL, 0x4c263a81e69035e0ULL,
    0xcb00c391bb52283cULL, 0xa32e531b8b65d088ULL, 0x4ef90da297486471ULL, 0xd8acdea946ef1938ULL,
    0x3f349ce33f76faa8ULL, 0x1d4f0bc7c7bbdcf9ULL, 0x3159b4cd4be0518aULL, 0x647378d9c97e9fc8ULL,
    0xc3ebd33483acc5eaULL, 0xeb6313faffa081c5ULL, 0x49daf0b751dd0d17ULL, 0x9e68d429265516d3ULL,
    0xfca1477d58be162bULL, 0xce31d07ad1b8f88fULL, 0x280416958f3acb45ULL, 0x7e404bbbcafbd7afULL,
};

/* Number of this thread among all of the launch. */
__device__ static u64 thread_number(void)
{
    return (u64)blockIdx.x * blockDim.x + threadIdx.x;
}

/* Number of threads of the launch. */
__device__ static u64 thread_count(void)
{
    return (u64)gridDim.x * blockDim.x;
}

/* Any address: the hardware loads words from multiples of their size only. */
__device__ static u64 load64(const u8 *at)
{
    if (((u64)at & 7) == 0)
        return *(const u64 *)at;
    u64 word = 0;
    for (int i = 7; i >= 0; i--)
        word = word << 8 | at[i];
    return word;
}

__device__ static u64 load32(const u8 *at)
{
    return (u64)at[0] | (u64)at[1] << 8 | (u64)at[2] << 16 | (u64)at[3] << 24;
}

__device__ static u64 fold(u64 a, u64 b)
{
    return (a * b) ^ __umul64hi(a, b);
}

__device__ static u64 avalanche(u64 sum)
{
    sum ^= sum >> 37;
    sum *= PRIME_MX1;
    return sum ^ sum >> 32;
}

__device__ static u64 swap64(u64 word)
{
    u64 swapped = 0;
    for (int i = 0; i < 8; i++)
        swapped = swapped << 8 | (word >> (8 * i) & 0xff);
    return swapped;
}

__device__ static u64 rotate(u64 word, int by)
{
    return word << by | word >> (64 - by);
}

/* The word at any byte of the default secret. */
__device__ static u64 secret(u32 byte)
{
    u32 at = byte / 8, bits = byte % 8 * 8;
    return bits == 0 ? SECRET[at] : SECRET[at] >> bits | SECRET[at + 1] << (64 - bits);
}

/* Word `at` of the secret that a seed makes. */
__device__ static u64 seeded(u32 at, u64 seed)
{
    return at % 2 == 0 ? SECRET[at] + seed : SECRET[at] - seed;
}

/* The word at any byte, but a multiple of 8, of the secret that a seed makes. */
__device__ static u64 seeded_at(u32 byte, u64 seed)
{
    u32 at = byte / 8, bits = byte % 8 * 8;
    return seeded(at, seed) >> bits | seeded(at + 1, seed) << (64 - bits);
}

/* What a stripe adds to a lane. */
__device__ static u64 of_stripe(const u8 *stripe, u32 lane, u64 key)
{
    u64 keyed = load64(stripe + lane * 8) ^ key;
    return load64(stripe + (lane ^ 1) * 8) + (keyed & 0xffffffffULL) * (keyed >> 32);
}

__device__ static u64 first_sum(u32 lane)
{
    switch (lane) {
    case 0: return PRIME32_3;
    case 1: return PRIME64_1;
    case 2: return PRIME64_2;
    case 3: return PRIME64_3;
    case 4: return PRIME64_4;
    case 5: return PRIME32_2;
    case 6: return PRIME64_5;
    default: return PRIME32_1;
    }
}

__device__ static u64 mix16(const u8 *at, u32 key, u64 seed)
{
    return fold(load64(at) ^ (secret(key) + seed), load64(at + 8) ^ (secret(key + 8) - seed));
}

__device__ static u64 digest_to_16(const u8 *at, u64 len, u64 seed)
{
    if (len > 8) {
        u64 low = load64(at) ^ ((secret(24) ^ secret(32)) + seed);
        u64 high = load64(at + len - 8) ^ ((secret(40) ^ secret(48)) - seed);
        return avalanche(len + swap64(low) + high + fold(low, high));
    }
    if (len >= 4) {
        u64 keys = (secret(8) ^ secret(16)) - (seed ^ swap64(seed & 0xffffffffULL));
        u64 sum = (load32(at + len - 4) + (load32(at) << 32)) ^ keys;
        sum ^= rotate(sum, 49) ^ rotate(sum, 24);
        sum *= PRIME_MX2;
        sum ^= (sum >> 35) + len;
        sum *= PRIME_MX2;
        return sum ^ sum >> 28;
    }
    u64 sum = secret(56) ^ secret(64) ^ seed;
    if (len > 0) {
        u64 word = (u64)at[0] << 16 | (u64)at[len / 2] << 24 | (u64)at[len - 1] | len << 8;
        sum = word ^ (((secret(0) ^ secret(0) >> 32) & 0xffffffffULL) + seed);
    }
    sum ^= sum >> 33;
    sum *= PRIME64_2;
    sum ^= sum >> 29;
    sum *= PRIME64_3;
    return sum ^ sum >> 32;
}

__device__ static u64 digest_to_240(const u8 *at, u64 len, u64 seed)
{
    u64 sum = len * PRIME64_1;
    if (len <= 128) {
        for (u32 i = 0; i <= (len - 1) / 32; i++) {
            sum += mix16(at + 16 * i, 32 * i, seed);
            sum += mix16(at + len - 16 * (i + 1), 32 * i + 16, seed);
        }
        return avalanche(sum);
    }
    for (u32 i = 0; i < 8; i++)
        sum += mix16(at + 16 * i, 16 * i, seed);
    sum = avalanche(sum);
    for (u32 i = 8; i < len / 16; i++)
        sum += mix16(at + 16 * i, 16 * (i - 8) + 3, seed);
    return avalanche(sum + mix16(at + len - 16, 136 - 17, seed));
}

/* Sums the stripes of `len` bytes at each of `count` places: `sums[(block * groups + group) * 8 + lane]`. The last
 * stripe is not among them. */
__global__ void baton_digest_groups(const u8 *base, const u64 *at, const u64 *seeds, u64 len, u64 count, u64 *sums)
{
    u64 stripes = (len - 1) / STRIPE;
    u64 groups = (stripes + STRIPES_PER_GROUP - 1) / STRIPES_PER_GROUP;
    for (u64 i = thread_number(); i < count * groups * LANES; i += thread_count()) {
        u32 lane = i % LANES;
        u64 group = i / LANES % groups, block = i / LANES / groups;
        u64 first = group * STRIPES_PER_GROUP;
        u32 taken = stripes - first < STRIPES_PER_GROUP ? stripes - first : STRIPES_PER_GROUP;
        const u8 *from = base + at[block] + first * STRIPE;
        u64 sum = 0;
        for (u32 s = 0; s < taken; s++)
            sum += of_stripe(from + s * STRIPE, lane, seeded(s + lane, seeds[block]));
        sums[i] = sum;
    }
}

/* Folds the sums of each lane: `lanes[block * 8 + lane]`. */
__global__ void baton_digest_lanes(const u64 *sums, const u64 *seeds, u64 len, u64 count, u64 *lanes)
{
    u64 stripes = (len - 1) / STRIPE;
    u64 groups = (stripes + STRIPES_PER_GROUP - 1) / STRIPES_PER_GROUP;
    for (u64 i = thread_number(); i < count * LANES; i += thread_count()) {
        u32 lane = i % LANES;
        u64 block = i / LANES;
        u64 key = seeded(STRIPES_PER_GROUP + lane, seeds[block]);
        u64 sum = first_sum(lane);
        for (u64 group = 0; group < groups; group++) {
            sum += sums[(block * groups + group) * LANES + lane];
            if (group < stripes / STRIPES_PER_GROUP)
                sum = (sum ^ sum >> 47 ^ key) * PRIME32_1;
        }
        lanes[i] = sum;
    }
}

/* The digest of each block. */
__global__ void baton_digest_finish(const u8 *base, const u64 *at, const u64 *seeds, u64 len, u64 count,
                                    const u64 *lanes, u64 *digests)
{
    for (u64 block = thread_number(); block < count; block += thread_count()) {
        const u8 *from = base + at[block];
        u64 seed = seeds[block];
        if (len <= 16) {
            digests[block] = digest_to_16(from, len, seed);
            continue;
        }
        if (len <= SHORT_BYTES) {
            digests[block] = digest_to_240(from, len, seed);
            continue;
        }
        u64 sum = len * PRIME64_1;
        const u8 *last = from + len - STRIPE;
        for (u32 lane = 0; lane < LANES; lane += 2) {
            u64 even = lanes[block * LANES + lane] + of_stripe(last, lane, seeded_at(121 + lane * 8, seed));
            u64 odd = lanes[block * LANES + lane + 1] + of_stripe(last, lane + 1, seeded_at(129 + lane * 8, seed));
            sum += fold(even ^ seeded_at(11 + lane * 8, seed), odd ^ seeded_at(19 + lane * 8, seed));
        }
        digests[block] = avalanche(sum);
    }
}

/* Copies units of 16, 4, 2 or 1 bytes, `from` and `to` being multiples of that. */
__device__ static void copy_unit(const u8 *from, u8 *to, u32 unit)
{
    switch (unit) {
    case 16: *(u128 *)to = *(const u128 *)from; break;
    case 4: *(u32 *)to = *(const u32 *)from; break;
    case 2: *(unsigned short *)to = *(const unsigned short *)from; break;
    default: *to = *from;
    }
}

/* Copies `len` bytes from each of `count` places to another: blocks gathered into one range, or scattered out of it. */
__global__ void baton_copy_blocks(const u8 *from, const u64 *from_at, u8 *to, const u64 *to_at, u64 len, u64 count,
                                  u32 unit)
{
    u64 units = len / unit;
    for (u64 i = thread_number(); i < count * units; i += thread_count()) {
        u64 block = i / units, within = i % units * unit;
        copy_unit(from + from_at[block] + within, to + to_at[block] + within, unit);
    }
}

/* A piece of a re-layout: three loops around a run, everything in bytes. */
typedef struct {
    u64 from, to, run, unit;
    u64 count[3], from_step[3], to_step[3];
} piece;

/* Carries pieces of source blocks to their places in destination blocks. */
__global__ void baton_relayout(const u8 *from, u8 *to, const piece *pieces, u64 count)
{
    for (u64 p = blockIdx.y; p < count; p += gridDim.y) {
        const piece *it = &pieces[p];
        u64 units = it->run / it->unit;
        u64 total = units * it->count[0] * it->count[1] * it->count[2];
        for (u64 i = thread_number(); i < total; i += thread_count()) {
            u64 rest = i / units, within = i % units * it->unit;
            u64 inner = rest % it->count[0], middle = rest / it->count[0] % it->count[1];
            u64 outer = rest / it->count[0] / it->count[1];
            u64 source = it->from + inner * it->from_step[0] + middle * it->from_step[1] + outer * it->from_step[2];
            u64 dest = it->to + inner * it->to_step[0] + middle * it->to_step[1] + outer * it->to_step[2];
            copy_unit(from + source + within, to + dest + within, it->unit);
        }
    }
}

#ifdef __cplusplus
}
#endif
