// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * One group's programs on a service's cgroup. They run for every socket that
 * was created in the cgroup, so each first makes sure that it is the group's.
 *
 * - send4, send6: the server answers a flow.
 * - connect4, connect6, set_option: the guard of the group and its program.
 * - set_option: the socket-option ABI.
 * - get_option: the socket-option ABI.
 *
 * Cgroup programs may be preempted: what they count is counted atomically.
 */
#include "flow.h"

#define PAGE 4096

/* Level IPPROTO_UDP. */
enum {
	UDP_GRM_WORKING_GEN = 200,
	UDP_GRM_SOCKET_GEN = 201,
	UDP_GRM_DISSECTOR = 202,
	UDP_GRM_FLOW_ASSURE = 203,
	UDP_GRM_SOCKET_APP = 204,
	UDP_GRM_KEY = 205, /* ours: struct abi_key */
};

enum {
	EBADFD = 77,
	NO_INDEX = 0xffffffff,
	ABI_FLOW = 0,
	ABI_CBPF = 1,
	ABI_NOOP = 4,
	ABI_VERBOSE = 0x8000,
	ABI_FILTERS = 64,
};

struct abi_socket_gen {
	__u32 generation;
	__u32 index;
	__u16 cookie;
	__u16 pad;
};

struct abi_dissector {
	__u32 type;
	__u32 timeout; /* seconds */
	__u32 max_apps;
	__u32 digest;
	__u8 label[100];
	__u32 length;
	__u64 filter[ABI_FILTERS];
} __attribute__((packed));

/* Names a socket for ever: (epoch, generation) never comes again. */
struct abi_key {
	__u64 epoch;
	__u64 generation;
	__u32 app;
	__u32 bank;
	__u32 index;
	__u32 cookie;
};

struct sockaddr_in {
	__u16 family;
	__u16 port;
	__u32 address;
	__u64 zero;
};

struct sockaddr_in6 {
	__u16 family;
	__u16 port;
	__u32 flowinfo;
	__u32 address[4];
	__u32 scope;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct grm_socket);
} sockets SEC(".maps");

/* The group's address as bpf_sock shows it; set when loaded. */
const volatile __u32 group_port = 0; /* host order */
const volatile __u32 group_protocol = IPPROTO_UDP;
const volatile __u64 group_netns = 0;
const volatile __u32 group_bound = 0; /* 0: to any address; else AF_INET or AF_INET6 */
const volatile __u32 group_address[4] = {};
/* What UDP_GRM_DISSECTOR shows. */
const volatile __u32 abi_type = 0;
const volatile __u32 abi_timeout = 0;
const volatile __u32 abi_apps = 1;
const volatile __u32 abi_length = 0;
const volatile __u64 abi_filter[ABI_FILTERS] = {};

/* Its address, that is: the options ask for the network namespace too. Cheapest first: most sockets of a cgroup that are not the group's have another port. */
static __always_inline bool is_ours(struct bpf_sock *sk)
{
	if (sk->src_port != group_port || sk->protocol != group_protocol)
		return false;
	if (group_bound == AF_INET)
		return sk->src_ip4 == group_address[0];
	if (group_bound == AF_INET6)
		return sk->src_ip6[0] == group_address[0] && sk->src_ip6[1] == group_address[1] &&
		       sk->src_ip6[2] == group_address[2] && sk->src_ip6[3] == group_address[3];
	return true;
}

static __always_inline void answered(struct flow_key *k)
{
	struct flow_found f;

	flow_hash(k);
	if (!flow_find(k, &f))
		return;
	f.way &= FLOW_WAYS - 1;
	if (!(READ_ONCE(f.b->info[f.way]) & FLOW_ANSWERED))
		__sync_fetch_and_or(&f.b->info[f.way], FLOW_ANSWERED);
}

SEC("cgroup/sendmsg4")
int send4(struct bpf_sock_addr *ctx)
{
	struct flow_key k = {};

	if (!ctx->sk || !is_ours(ctx->sk))
		return 1;
	flow_set_ipv4(&k, ctx->user_ip4);
	k.port = ctx->user_port;
	answered(&k);
	return 1;
}

SEC("cgroup/sendmsg6")
int send6(struct bpf_sock_addr *ctx)
{
	struct flow_key k = {};

	if (!ctx->sk || !is_ours(ctx->sk))
		return 1;
	k.address.high = (__u64)ctx->user_ip6[1] << 32 | ctx->user_ip6[0];
	k.address.low = (__u64)ctx->user_ip6[3] << 32 | ctx->user_ip6[2];
	k.port = ctx->user_port;
	answered(&k);
	return 1;
}

/* A member may not connect; other sockets of the same address may, one for each client. */
static __always_inline int may_connect(struct bpf_sock_addr *ctx)
{
	if (!ctx->sk || !is_ours(ctx->sk) || !bpf_sk_storage_get(&sockets, ctx->sk, NULL, 0))
		return 1;
	count_atomic(GRM_GUARDED);
	return 0; /* EPERM */
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return may_connect(ctx);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return may_connect(ctx);
}

/* Leaves an option to the kernel. Of a long one we only see the first page, and must say that we did not touch it. */
static __always_inline int leave(struct bpf_sockopt *ctx)
{
	if (ctx->optlen > PAGE)
		ctx->optlen = 0;
	return 1;
}

static __always_inline int refuse(int errno)
{
	count_atomic(GRM_ABI_ERROR);
	bpf_set_retval(-errno);
	return 0;
}

/*
 * The option is dealt with: the kernel does not see it, and what the hook of an
 * earlier life of the group may have said (a link goes some time after its pin)
 * does not count.
 */
static __always_inline int swallow(struct bpf_sockopt *ctx)
{
	bpf_set_retval(0);
	ctx->optlen = -1;
	return 1;
}

/* The service's, if the socket is still one of its. */
static __always_inline struct grm_control *control_of(struct grm_socket *s)
{
	struct grm_control *c = the_control();

	return c && READ_ONCE(c->epoch) == s->epoch ? c : NULL;
}

static __always_inline struct grm_bank *bank_of(struct grm_control *c, __u32 bank)
{
	return &c->bank[bank & (GRM_BANKS - 1)];
}

/* The number that servers know a bank's generation by. False: it has none yet. */
static __always_inline bool name_of(struct grm_bank *b, __u32 *name)
{
	__u32 naming = READ_ONCE(b->naming);

	*name = naming == GRM_BY_SERVER ? READ_ONCE(b->name) : READ_ONCE(b->generation);
	return naming != GRM_PARKED && READ_ONCE(b->generation);
}

/*
 * These two are global functions, so that the verifier looks at them once, and
 * not again for each way through their loops.
 */
__noinline __u64 order_with_head(__u64 order, __u32 head)
{
	__u64 list = order >> 4, before = 0, bank = head & (GRM_BANKS - 1);
	__u32 n = order & 15;

	if (n > GRM_FALLBACK)
		n = GRM_FALLBACK;
	for (__u32 i = 0; i < GRM_FALLBACK; i++) {
		if (i < n && (list >> 5 * i & (GRM_BANKS - 1)) == bank)
			return ((list & ~(before << 5 | 31)) | (list & before) << 5 | bank) << 4 | n;
		before = before << 5 | 31;
	}
	if (n < GRM_FALLBACK)
		n++;
	/* What is beyond n is never looked at; the oldest of a full list falls out. */
	return (list << 5 | bank) << 4 | n;
}

/* The bank of the newest generation that is called that; GRM_BANKS if none is. */
__noinline __u32 bank_named(__u32 name)
{
	struct grm_control *c = the_control();
	__u32 bank = GRM_BANKS, found;
	__u64 newest = 0;

	if (!c)
		return GRM_BANKS;
	for (__u32 i = 0; i < GRM_BANKS; i++) {
		struct grm_bank *b = bank_of(c, i);

		if (name_of(b, &found) && found == name && READ_ONCE(b->generation) > newest) {
			newest = READ_ONCE(b->generation);
			bank = i;
		}
	}
	return bank;
}

/* A server flips by itself: to its own bank, or to another that it names. */
static __noinline int set_working(struct grm_socket *s, __u32 name)
{
	struct grm_control *c = control_of(s);
	__u32 bank, found;

	if (!c)
		return EBADF;
	bank = s->bank & (GRM_BANKS - 1);
	if (!name_of(bank_of(c, bank), &found) || found != name)
		bank = bank_named(name);
	if (bank >= GRM_BANKS)
		return ENOENT;
	switch (READ_ONCE(bank_of(c, bank)->state)) {
	case GRM_PREPARED:
		WRITE_ONCE(bank_of(c, bank)->state, GRM_SERVING);
		break;
	case GRM_SERVING:
		break;
	default: /* it was told to end, or has */
		return EPERM;
	}
	__sync_fetch_and_or(&c->alive, 1u << bank);
	for (int i = 0; i < FLOW_RETRIES; i++) {
		__u64 order = READ_ONCE(c->order);

		if (cmpxchg(&c->order, order, order_with_head(order, bank)) == order)
			return 0;
	}
	return EAGAIN;
}

/* A server says which generation its socket is to be of: the one that it is, or, if nobody has named it, any. */
static __noinline int set_generation(struct grm_socket *s, __u32 name)
{
	struct grm_control *c = control_of(s);
	struct grm_bank *b;
	__u32 now;

	if (!c)
		return EBADF;
	b = bank_of(c, s->bank);
	if (name_of(b, &now))
		return now == name ? 0 : EPERM;
	WRITE_ONCE(b->name, name);
	WRITE_ONCE(b->naming, GRM_BY_SERVER);
	return 0;
}

/* A server says that a flow is real and its own. */
static __noinline int assure(struct grm_socket *s, struct flow_insert *in)
{
	struct grm_meta *m = the_meta();
	struct grm_control *c = control_of(s);
	__u32 home = GRM_HOME(s->app & (GRM_APPS - 1), s->bank & (GRM_BANKS - 1), s->index & (GRM_SLOTS - 1), s->tag);
	struct flow_found f;

	if (!m || !c)
		return EBADF;
	if (abi_type != ABI_FLOW)
		return EOPNOTSUPP;
	flow_hash(&in->key);
	in->now = stamp();
	in->home = home;
	in->info = FLOW_ANSWERED | FLOW_PACKET * FLOW_GROWN_PACKETS;
	in->flags = FLOW_ASSURED | FLOW_GROWN;
	if (flow_find(&in->key, &f)) {
		__u32 old = f.word, bank = GRM_HOME_BANK(old);
		__u64 word = READ_ONCE(m->bank[GRM_HOME_APP(old)][bank].word);

		if (old != home && f.last & FLOW_ASSURED && !flow_expired(f.last, in->now) &&
		    GRM_WORD_TAG(word) == GRM_HOME_TAG(old) && READ_ONCE(c->alive) >> bank & 1)
			return EEXIST;
		in->old_last = f.last;
		in->old_word = f.word;
	}
	switch (flow_insert(in)) {
	case FLOW_FULL:
		count_atomic(GRM_TABLE_FULL);
		return ENOSPC;
	case FLOW_THERE:
		if (in->home != home)
			return EEXIST;
	}
	if (!(in->old_last & FLOW_ASSURED))
		__sync_fetch_and_add(&stats_of(c, s->bank)->assured, 1);
	return 0;
}

/* Is it what the group has, as far as it is said? */
static __always_inline int same_dissector(struct bpf_sockopt *ctx)
{
	struct abi_dissector *d = ctx->optval;

	switch (ctx->optlen) {
	case 4:
	case 8:
	case 12:
	case 16:
	case 28:
	case 116:
	case 376:
	case 632:
		break;
	default:
		return EINVAL;
	}
	if ((void *)d + 4 > ctx->optval_end)
		return EINVAL;
	if ((d->type & ~ABI_VERBOSE) != abi_type)
		return EPERM;
	if (ctx->optlen >= 8 && (void *)d + 8 <= ctx->optval_end && d->timeout && d->timeout != abi_timeout)
		return EPERM;
	if (ctx->optlen >= 12 && (void *)d + 12 <= ctx->optval_end && d->max_apps > 1 && d->max_apps != abi_apps)
		return EPERM;
	if (ctx->optlen >= 16 && (void *)d + 16 <= ctx->optval_end && d->digest)
		return EPERM;
	if ((void *)(d + 1) <= ctx->optval_end && abi_type == ABI_CBPF) {
		if (d->length != abi_length)
			return EPERM;
		for (__u32 i = 0; i < ABI_FILTERS; i++) {
			if (i < abi_length && d->filter[i] != abi_filter[i])
				return EPERM;
		}
	}
	return 0;
}

static __always_inline int set_abi(struct bpf_sockopt *ctx, struct grm_socket *s)
{
	struct flow_insert in = {};
	__u32 *value = ctx->optval;
	int error;

	if (ctx->optname == UDP_GRM_FLOW_ASSURE) {
		struct sockaddr_in6 *six = ctx->optval;
		struct sockaddr_in *four = ctx->optval;

		if (ctx->optlen >= (__s32)sizeof(*six) && (void *)(six + 1) <= ctx->optval_end &&
		    six->family == AF_INET6) {
			in.key.address.high = (__u64)six->address[1] << 32 | six->address[0];
			in.key.address.low = (__u64)six->address[3] << 32 | six->address[2];
			in.key.port = six->port;
		} else if (ctx->optlen >= (__s32)sizeof(*four) && (void *)(four + 1) <= ctx->optval_end &&
			   four->family == AF_INET) {
			flow_set_ipv4(&in.key, four->address);
			in.key.port = four->port;
		} else {
			return refuse(EINVAL);
		}
		error = assure(s, &in);
		return error ? refuse(error) : swallow(ctx);
	}
	if (ctx->optname == UDP_GRM_DISSECTOR) {
		error = same_dissector(ctx);
		return error ? refuse(error) : swallow(ctx);
	}
	/* The kernel's buffer is longer than a short value, so its end does not tell. */
	if (ctx->optlen < (__s32)sizeof(*value) || (void *)(value + 1) > ctx->optval_end)
		return refuse(EINVAL);
	switch (ctx->optname) {
	case UDP_GRM_WORKING_GEN:
		error = set_working(s, *value);
		break;
	case UDP_GRM_SOCKET_GEN:
		error = set_generation(s, *value);
		break;
	case UDP_GRM_SOCKET_APP:
		error = *value >= max_apps ? EOVERFLOW : EEXIST;
		break;
	default: /* the key is only read */
		error = EPERM;
	}
	return error ? refuse(error) : swallow(ctx);
}

/*
 * Is it root that attaches a program, and one of grm's own threads? The name
 * keeps servers that run as root from doing so by accident. It is the same for
 * all groups and versions, as an older one's hooks may still be there.
 */
static __always_inline bool is_activation(void)
{
	char name[16] = {};

	return !(__u32)bpf_get_current_uid_gid() && !bpf_get_current_comm(name, sizeof(name)) &&
	       !__builtin_memcmp(name, "grm:attach", sizeof("grm:attach"));
}

/*
 * Any member of the group may replace the program of all. One that leaves the
 * group but keeps the address (SO_REUSEPORT 0, a device, a connection that is
 * given up again) even gets all packets, whoever's they are: the kernel finds
 * it first, and asks no program.
 */
enum takeover {
	TAKEOVER_NONE,
	TAKEOVER_TOLD,    /* whoever tries is told that it worked: servers do this in good faith */
	TAKEOVER_REFUSED,
};

static __always_inline enum takeover takeover(struct bpf_sockopt *ctx)
{
	__s32 *index = ctx->optval;

	if (ctx->level != SOL_SOCKET)
		return TAKEOVER_NONE;
	switch (ctx->optname) {
	case SO_REUSEPORT:
	case SO_ATTACH_REUSEPORT_CBPF:
	case SO_ATTACH_REUSEPORT_EBPF:
	case SO_DETACH_REUSEPORT_BPF:
		return TAKEOVER_TOLD;
	case SO_BINDTOIFINDEX:
		/* Bound to no interface at all, it gets nothing: so a socket is retired before it is closed (internal/reuseport). */
		if ((void *)(index + 1) <= ctx->optval_end && *index == NO_INTERFACE)
			return TAKEOVER_NONE;
		return TAKEOVER_REFUSED;
	case SO_BINDTODEVICE:
		return TAKEOVER_REFUSED;
	}
	return TAKEOVER_NONE;
}

SEC("cgroup/setsockopt")
int set_option(struct bpf_sockopt *ctx)
{
	enum takeover attempt = takeover(ctx);
	bool abi = ctx->level == IPPROTO_UDP && ctx->optname >= UDP_GRM_WORKING_GEN &&
		   ctx->optname <= UDP_GRM_KEY && group_protocol == IPPROTO_UDP;
	struct grm_socket *s;

	if (likely(!attempt && !abi) || !ctx->sk || !is_ours(ctx->sk) || bpf_get_netns_cookie(ctx) != group_netns)
		return leave(ctx);
	if (attempt) {
		if (is_activation())
			return leave(ctx);
		count_atomic(GRM_GUARDED);
		if (attempt == TAKEOVER_TOLD)
			return swallow(ctx);
		bpf_set_retval(-EPERM);
		return 0;
	}
	s = bpf_sk_storage_get(&sockets, ctx->sk, NULL, 0);
	if (!s)
		return refuse(EBADF);
	return set_abi(ctx, s);
}

/* Writes as much of a value as the caller has room for, in whole fields. */
static __always_inline int give(struct bpf_sockopt *ctx, __s32 size)
{
	/* Two stores: the verifier knows no single one for both. */
	WRITE_ONCE(ctx->optlen, size);
	WRITE_ONCE(ctx->retval, 0);
	return 1;
}

static __always_inline int get_socket_gen(struct bpf_sockopt *ctx, struct grm_socket *s, struct grm_control *c)
{
	struct abi_socket_gen *v = ctx->optval;
	bool named;
	__u32 name;

	named = name_of(bank_of(c, s->bank), &name);
	if ((void *)v + 4 > ctx->optval_end)
		return refuse(EINVAL);
	v->generation = named ? name : 0;
	if ((void *)v + 8 > ctx->optval_end)
		return give(ctx, 4);
	v->index = named ? s->index : NO_INDEX;
	if ((void *)v + 12 > ctx->optval_end)
		return give(ctx, 8);
	v->cookie = named ? s->cookie : 0;
	v->pad = 0;
	return give(ctx, 12);
}

static __always_inline int get_dissector(struct bpf_sockopt *ctx)
{
	struct abi_dissector *d = ctx->optval;

	if ((void *)d + 4 > ctx->optval_end)
		return refuse(EINVAL);
	d->type = abi_type;
	if ((void *)d + 8 > ctx->optval_end)
		return give(ctx, 4);
	d->timeout = abi_timeout;
	if ((void *)d + 12 > ctx->optval_end)
		return give(ctx, 8);
	d->max_apps = abi_apps;
	if ((void *)d + 16 > ctx->optval_end)
		return give(ctx, 12);
	d->digest = 0;
	if ((void *)d + 116 > ctx->optval_end)
		return give(ctx, 16);
	__builtin_memset(d->label, 0, sizeof(d->label));
	if ((void *)(d + 1) > ctx->optval_end)
		return give(ctx, 116);
	d->length = abi_length;
	for (__u32 i = 0; i < ABI_FILTERS; i++)
		d->filter[i] = abi_filter[i];
	return give(ctx, sizeof(*d));
}

SEC("cgroup/getsockopt")
int get_option(struct bpf_sockopt *ctx)
{
	struct grm_control *c;
	struct grm_socket *s;
	struct abi_key *key;
	__u32 *value, name;

	if (likely(ctx->level != IPPROTO_UDP || ctx->optname < UDP_GRM_WORKING_GEN || ctx->optname > UDP_GRM_KEY) ||
	    group_protocol != IPPROTO_UDP || !ctx->sk || !is_ours(ctx->sk) || bpf_get_netns_cookie(ctx) != group_netns)
		return leave(ctx);
	s = bpf_sk_storage_get(&sockets, ctx->sk, NULL, 0);
	if (!s)
		return refuse(EBADFD);
	c = control_of(s);
	if (!c)
		return refuse(EBADFD);
	if (ctx->optname == UDP_GRM_SOCKET_GEN)
		return get_socket_gen(ctx, s, c);
	if (ctx->optname == UDP_GRM_DISSECTOR)
		return get_dissector(ctx);
	if (ctx->optname == UDP_GRM_KEY) {
		key = ctx->optval;
		if ((void *)(key + 1) > ctx->optval_end)
			return refuse(EINVAL);
		key->epoch = s->epoch;
		key->generation = s->generation;
		key->bank = s->bank;
		key->index = s->index;
		key->app = s->app;
		key->cookie = s->cookie;
		return give(ctx, sizeof(*key));
	}
	value = ctx->optval;
	if ((void *)(value + 1) > ctx->optval_end)
		return refuse(EINVAL);
	switch (ctx->optname) {
	case UDP_GRM_WORKING_GEN:
		name = 0;
		if (READ_ONCE(c->order) & 15)
			name_of(bank_of(c, READ_ONCE(c->order) >> 4), &name);
		*value = name;
		break;
	case UDP_GRM_SOCKET_APP:
		*value = s->app;
		break;
	default: /* a flow is only assured */
		return leave(ctx);
	}
	return give(ctx, sizeof(*value));
}

char _license[] SEC("license") = "Dual MIT/GPL";
