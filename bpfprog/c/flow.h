/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * The flow table: one set-associative array that keeps embryos and assured
 * flows in the same entries, ages them as it goes, and never gives away a live
 * assured one.
 *
 * A key has two buckets of eight ways. The life of a way is in its `last`:
 *
 *   0                        free
 *   FLOW_BUSY                somebody writes it
 *   FLOW_TENTATIVE | random  written, its owner looks for others of the same key
 *   flags | stamp            settled, seen at that time
 *
 * so that whatever makes a way one that may be given up changes that one word:
 * refreshing, assuring, and giving up are compare-and-swaps of it, and none can
 * overtake another unseen.
 *
 * Only settled ways are found. Two CPUs that insert the same key at once do
 * not find each other's way, and each takes one. So an insertion publishes its
 * way as tentative, and then looks at all sixteen:
 *
 *   - a settled one of the same key has won: free the own way, use that home;
 *   - a lower tentative one wins: free the own way, use that home;
 *   - a higher tentative one loses: clear it;
 *
 * and settles only by a compare-and-swap of its own tentative word, which
 * fails if a lower one has cleared it meanwhile. Of two that both publish
 * before they look (the swaps are full barriers), at least one sees the other;
 * if the lower one does, either its clearing or the other's settling succeeds,
 * not both. So at most one way of a key ever settles, and both packets go to
 * the same home. The random part keeps a slow CPU from taking a later
 * tentative word in the same way for the one it saw.
 *
 * A key whose own way is expired, or names a generation that is gone, renews
 * that way: it is the one to give up, and all else is as above. Whoever meets a
 * way of its key reads the time first and the word then, so that with the time
 * after a renewal it never has the word from before.
 *
 * Fingerprint and home share one 64-bit word, so that no reader gets a home
 * that belongs to another key than the one it compared, even if the way is
 * given away between two loads.
 */
#ifndef GRM_FLOW_H
#define GRM_FLOW_H

#include "group.h"

#define FLOW_WAYS 8
#define FLOW_BUSY 0xffffffffu
#define FLOW_TENTATIVE 0x80000000u
#define FLOW_ASSURED 0x40000000u
#define FLOW_GROWN 0x20000000u
#define FLOW_STAMP 0x1fffffffu
#define FLOW_YOUNG 10   /* stamps that a way lives unless it is both assured and grown */
#define FLOW_RETRIES 4

/* The lower half of `info` is the remote port as it is on the wire. */
#define FLOW_ANSWERED 0x10000u
#define FLOW_PACKET 0x1000000u /* the highest byte counts the client's packets until: */
#define FLOW_PACKETS(info) ((info) >> 24)
#define FLOW_GROWN_PACKETS 3

struct flow_address {
	__u64 high, low;
};

struct flow_bucket {
	__u64 word[FLOW_WAYS]; /* home | fingerprint << 32 */
	__u32 last[FLOW_WAYS];
	__u32 info[FLOW_WAYS];
	struct flow_address address[FLOW_WAYS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 3); /* a power of two, and one that is user space's own (package flowtable) */
	__type(key, __u32);
	__type(value, struct flow_bucket);
	__uint(map_flags, BPF_F_MMAPABLE);
} flows SEC(".maps");

const volatile __u32 flow_mask = 1;     /* number of buckets, a power of two, less 1 */
const volatile __u32 flow_timeout = 0;  /* stamps */
const volatile __u32 flow_ipv4 = 0;     /* the group's packets are all IPv4 */
const volatile __u64 flow_seed[2] = {}; /* secret, or an attacker could aim at one bucket */

/*
 * A link-local sender's interface is not in the key, as neither program type is
 * told it: two hosts of one link-local address and port on two links, both at a
 * group of the wildcard address, would count as one flow.
 */
struct flow_key {
	struct flow_address address; /* IPv4 in the mapped form, whatever the socket's family */
	__u32 port;                  /* 16 bits, network order */
	__u32 fingerprint;
	__u32 bucket[2];
};

static __always_inline void flow_set_ipv4(struct flow_key *k, __u32 address)
{
	k->address.high = 0;
	k->address.low = (__u64)address << 32 | 0xffff0000u;
}

static __always_inline void flow_hash(struct flow_key *k)
{
	__u64 x = (k->address.low ^ flow_seed[0]) * 0x9fb21c651e98df25ull;

	if (!flow_ipv4) {
		x ^= x >> 32;
		x = (x ^ k->address.high) * 0xd6e8feb86659fd93ull;
	}
	x ^= x >> 32;
	x = (x ^ flow_seed[1] ^ k->port) * 0xa0761d6478bd642full;
	x ^= x >> 29;
	x *= 0xe7037ed1a0b428dbull;
	k->fingerprint = x >> 32;
	x ^= x >> 32;
	k->bucket[0] = (__u32)x & flow_mask;
	k->bucket[1] = ((__u32)x ^ (k->fingerprint * 0x5bd1e995u >> 3 | 1)) & flow_mask;
}

static __always_inline struct flow_bucket *flow_bucket(__u32 index)
{
	return bpf_map_lookup_elem(&flows, &index);
}

static __always_inline bool flow_is(struct flow_bucket *b, __u32 way, __u64 word, const struct flow_key *k)
{
	return (__u32)(word >> 32) == k->fingerprint &&
	       READ_ONCE(b->address[way].low) == k->address.low &&
	       (flow_ipv4 || READ_ONCE(b->address[way].high) == k->address.high) &&
	       (READ_ONCE(b->info[way]) & 0xffff) == k->port;
}

static __always_inline bool flow_settled(__u32 last)
{
	return (__s32)last > 0;
}

/* A stamp from the future comes from a CPU whose clock ticked first. */
static __always_inline bool flow_expired(__u32 last, __u32 now)
{
	__u32 old = FLOW_ASSURED | FLOW_GROWN;
	__u32 life = (last & old) == old ? flow_timeout : FLOW_YOUNG;

	return (__s32)(now - (last & FLOW_STAMP)) > (__s32)life;
}

/* One settled way, as it was when it was found. */
struct flow_found {
	struct flow_bucket *b; /* NULL: none */
	__u32 way;
	__u32 last;
	__u64 word;
};

static __always_inline bool flow_find_in(struct flow_bucket *b, const struct flow_key *k, struct flow_found *f)
{
	for (__u32 way = 0; way < FLOW_WAYS; way++) {
		__u64 word;

		/* The upper half alone first: most ways end here. */
		if (likely(READ_ONCE(((__u32 *)&b->word[way])[1]) != k->fingerprint))
			continue;
		/* In this order: a way that was renewed in between is seen with the old time, and looked at again. */
		f->last = READ_ONCE(b->last[way]);
		word = READ_ONCE(b->word[way]);
		if (!flow_is(b, way, word, k) || !flow_settled(f->last))
			continue;
		f->b = b;
		f->way = way;
		f->word = word;
		return true;
	}
	return false;
}

static __always_inline bool flow_find(const struct flow_key *k, struct flow_found *f)
{
	struct flow_bucket *b = flow_bucket(k->bucket[0]);

	if (b && flow_find_in(b, k, f))
		return true;
	b = flow_bucket(k->bucket[1]);
	return b && flow_find_in(b, k, f);
}

/* Reads a way's time and then its word, with a barrier in between: the word is not older than the time. */
static __always_inline void flow_look(struct flow_bucket *b, __u32 way, __u32 *last, __u64 *word)
{
	*last = __sync_fetch_and_or(&b->last[way], 0);
	*word = READ_ONCE(b->word[way]);
}

enum flow_outcome {
	FLOW_INSERTED, /* with the home that was asked for */
	FLOW_THERE,    /* another insertion of the same key counts: home is that one's now */
	FLOW_FULL,
};

/* An insertion at work. */
struct flow_insert {
	struct flow_key key;
	__u64 old_word;  /* the key's settled way that is to be renewed, as it was found; */
	__u32 old_last;  /* 0: there was none */
	__u32 home;
	__u32 info;      /* to begin with, without the port */
	__u32 flags;     /* of `last` */
	__u32 now;
	__u32 evicted;   /* a live embryo had to go */
	__u32 raced;     /* another CPU inserted the same key */
};

#define FLOW_NONE (2 * FLOW_WAYS)
#define FLOW_OTHER (2 * FLOW_WAYS + 1)
#define FLOW_RETRY (2 * FLOW_WAYS + 2)

struct flow_candidate {
	__u32 way; /* 0..15, or FLOW_NONE */
	__u32 last; /* what its word was */
};

/* All fields are working memory of flow_victim but the first. */
struct flow_victim {
	struct flow_candidate best; /* way: FLOW_NONE: only live assured ones; FLOW_OTHER: the key has another home by now; FLOW_RETRY: it may soon */
	struct flow_candidate free[2];
	__u32 live[2];
	__u32 age;
	__u32 pad;
};

/*
 * The functions from here on are global ones: the verifier looks at each once,
 * and not again for each way through the loops of the others. flow_victim keeps
 * what it has found so far in memory that the verifier does not follow, or it
 * would look at each way again for each thing that may have been found before.
 *
 * The way to give up: the one to renew; else a free or expired one, from the
 * emptier bucket; else the oldest embryo of both.
 */
__noinline int flow_victim(struct flow_insert *in, struct flow_victim *v)
{
	struct flow_bucket *b0, *b1;

	if (!in || !v)
		return 0;
	b0 = flow_bucket(in->key.bucket[0]);
	b1 = flow_bucket(in->key.bucket[1]);
	if (!b0 || !b1)
		return 0;
	in->evicted = 0;
	for (__u32 i = 0; i < 2 * FLOW_WAYS; i++) {
		struct flow_bucket *b = i < FLOW_WAYS ? b0 : b1;
		__u32 side = i / FLOW_WAYS & 1, way = i % FLOW_WAYS, age;
		__u64 word = READ_ONCE(b->word[way]);
		__u32 last = READ_ONCE(b->last[way]);

		if (flow_settled(last) && flow_is(b, way, word, &in->key)) {
			flow_look(b, way, &last, &word);
			v->best.last = last;
			v->best.way = i;
			if (last == in->old_last && word == in->old_word)
				return 0;
			v->best.way = FLOW_RETRY;
			if (flow_settled(last) && flow_is(b, way, word, &in->key)) {
				in->home = word;
				v->best.way = FLOW_OTHER;
			}
			return 0;
		}
		if (last == 0 || (flow_settled(last) && flow_expired(last, in->now))) {
			if (READ_ONCE(v->free[side].way) == FLOW_NONE) { /* the first one: it is found soonest */
				WRITE_ONCE(v->free[side].way, i);
				WRITE_ONCE(v->free[side].last, last);
			}
			continue;
		}
		WRITE_ONCE(v->live[side], READ_ONCE(v->live[side]) + 1);
		if (!flow_settled(last) || last & FLOW_ASSURED)
			continue;
		age = in->now - (last & FLOW_STAMP) + 2; /* + 2: a stamp may be one ahead of this CPU's clock */
		if (age > READ_ONCE(v->age)) {
			WRITE_ONCE(v->age, age);
			WRITE_ONCE(v->best.way, i);
			WRITE_ONCE(v->best.last, last);
		}
	}
	if (v->free[0].way < FLOW_NONE && (v->live[0] <= v->live[1] || v->free[1].way == FLOW_NONE))
		v->best = v->free[0];
	else if (v->free[1].way < FLOW_NONE)
		v->best = v->free[1];
	else
		in->evicted = v->best.way < FLOW_NONE;
	return 0;
}

/* What a look at all ways of a tentative insertion's key said. */
enum flow_verdict {
	FLOW_ALONE,
	FLOW_LOST,  /* in->home is the winner's now */
	FLOW_AGAIN, /* one changed meanwhile */
};

__noinline int flow_rivals(struct flow_insert *in, __u32 mine)
{
	struct flow_bucket *b0, *b1;
	int verdict = FLOW_ALONE;
	__u32 home = 0;

	if (!in)
		return FLOW_AGAIN;
	b0 = flow_bucket(in->key.bucket[0]);
	b1 = flow_bucket(in->key.bucket[1]);
	if (!b0 || !b1)
		return FLOW_AGAIN;
	for (__u32 i = 0; i < 2 * FLOW_WAYS; i++) {
		struct flow_bucket *b = i < FLOW_WAYS ? b0 : b1;
		__u32 way = i % FLOW_WAYS;
		__u32 last = READ_ONCE(b->last[way]);
		__u64 word = READ_ONCE(b->word[way]);

		if (i == mine || last == 0 || last == FLOW_BUSY || !flow_is(b, way, word, &in->key))
			continue;
		flow_look(b, way, &last, &word);
		if (last == 0)
			continue;
		if (last == FLOW_BUSY || !flow_is(b, way, word, &in->key))
			return FLOW_AGAIN;
		in->raced = 1;
		if (flow_settled(last)) {
			in->home = word;
			return FLOW_LOST;
		}
		if (i < mine) {
			home = word;
			verdict = FLOW_LOST;
		} else if (cmpxchg(&b->last[way], last, 0) != last) {
			return FLOW_AGAIN;
		}
	}
	if (verdict == FLOW_LOST)
		in->home = home;
	return verdict;
}

/*
 * Inserts in->key, or renews its own way. It fails rather than give up a live
 * assured flow, and after a few tries that others came before.
 */
__noinline int flow_insert(struct flow_insert *in)
{
	if (!in)
		return FLOW_FULL;
	for (int try = 0; try < FLOW_RETRIES; try++) {
		struct flow_victim v = {
			.best.way = FLOW_NONE, .free[0].way = FLOW_NONE, .free[1].way = FLOW_NONE,
		};
		int outcome = FLOW_INSERTED;
		struct flow_bucket *b;
		__u32 tentative, way;
		__u64 word;

		flow_victim(in, &v);
		if (v.best.way == FLOW_OTHER)
			return FLOW_THERE;
		if (v.best.way == FLOW_RETRY)
			continue;
		if (v.best.way >= FLOW_NONE)
			return FLOW_FULL;
		b = flow_bucket(in->key.bucket[v.best.way / FLOW_WAYS & 1]);
		if (!b)
			return FLOW_FULL;
		way = v.best.way % FLOW_WAYS;
		if (cmpxchg(&b->last[way], v.best.last, FLOW_BUSY) != v.best.last)
			continue;
		/* Another CPU may have renewed it within the same stamp: then that one's home counts. */
		word = READ_ONCE(b->word[way]);
		if (v.best.last && v.best.last == in->old_last && word != in->old_word && flow_is(b, way, word, &in->key)) {
			in->home = word;
			outcome = FLOW_THERE;
		}
		WRITE_ONCE(b->word[way], in->home | (__u64)in->key.fingerprint << 32);
		WRITE_ONCE(b->address[way].high, in->key.address.high);
		WRITE_ONCE(b->address[way].low, in->key.address.low);
		WRITE_ONCE(b->info[way], in->key.port | in->info);
		tentative = FLOW_TENTATIVE | bpf_get_prandom_u32() >> 2;
		xchg(&b->last[way], tentative);
		for (int look = 0; look < FLOW_RETRIES; look++) {
			int verdict = flow_rivals(in, v.best.way);

			if (verdict == FLOW_LOST) {
				cmpxchg(&b->last[way], tentative, 0);
				return FLOW_THERE;
			}
			if (verdict == FLOW_ALONE &&
			    cmpxchg(&b->last[way], tentative, in->now | in->flags) == tentative)
				return outcome;
		}
		cmpxchg(&b->last[way], tentative, 0);
	}
	return FLOW_FULL;
}

#endif
