// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The steering programs: one for each dissector, for a group with one service
 * and for one with several. Each ends in one of two ways: a socket is selected,
 * or the packet is dropped and counted. None leaves the choice to the kernel.
 *
 * The type is sk_reuseport/migrate, so that the connections that a closing TCP
 * listener has not accepted go to the working bank.
 */
#include "flow.h"
#include "select.h"

const volatile __u32 flow_assure = GRM_ASSURE_REPLY;

/* A packet of which nothing is known but, perhaps, its app. */
static __always_inline int steer_new(struct sk_reuseport_md *md, struct grm_meta *m, __u32 app, bool apps)
{
	struct grm_control *control = resolve_app(&app, apps);
	struct choice c = {};

	if (!select_new(md, m, app, control, &c))
		return SK_DROP;
	count_new(&c, stamp());
	return SK_PASS;
}

SEC("sk_reuseport/migrate")
int steer_noop(struct sk_reuseport_md *md)
{
	struct grm_meta *m = the_meta();

	return m ? steer_new(md, m, 0, false) : SK_DROP;
}

/* The sender. False if the headers cannot be read, which the kernel's own parsing rules out. */
static __always_inline bool read_key(struct sk_reuseport_md *md, struct flow_key *k)
{
	__u16 *ports = md->data;
	__u16 port;
	__u32 ipv4;

	if (likely((void *)(ports + 1) <= md->data_end))
		port = *ports;
	else if (bpf_skb_load_bytes(md, 0, &port, sizeof(port)))
		return false;
	k->port = port;
	if (!flow_ipv4 && md->eth_protocol == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes_relative(md, 8, &k->address, 16, BPF_HDR_START_NET))
			return false;
	} else {
		if (bpf_skb_load_bytes_relative(md, 12, &ipv4, 4, BPF_HDR_START_NET))
			return false;
		flow_set_ipv4(k, ipv4);
	}
	flow_hash(k);
	return true;
}

/* A packet of a known flow: it is younger for it, and may become assured by it. */
static __always_inline void flow_seen(const struct flow_found *f, struct grm_stats *s, __u32 now)
{
	__u32 way = f->way & (FLOW_WAYS - 1);
	__u32 info = READ_ONCE(f->b->info[way]);
	__u32 want = now | (f->last & (FLOW_ASSURED | FLOW_GROWN));

	if (unlikely(FLOW_PACKETS(info) < FLOW_GROWN_PACKETS)) {
		__sync_fetch_and_add(&f->b->info[way], FLOW_PACKET);
		if (FLOW_PACKETS(info) + 1 >= FLOW_GROWN_PACKETS)
			want |= FLOW_GROWN;
	}
	if (flow_assure == GRM_ASSURE_PACKET || (flow_assure == GRM_ASSURE_REPLY && info & FLOW_ANSWERED))
		want |= FLOW_ASSURED;
	/* Writing only what changes keeps the line in all CPUs' caches. */
	if (unlikely(want != f->last) && cmpxchg(&f->b->last[way], f->last, want) == f->last &&
	    want & ~f->last & FLOW_ASSURED)
		s->assured++;
	if (want & FLOW_ASSURED)
		s->last_assured = now;
}

/* A new flow and its first packet: its next ones are to go where this one goes. */
static __always_inline int flow_begin(struct sk_reuseport_md *md, struct grm_meta *m, __u32 app,
				      struct grm_control *control, struct flow_insert *in)
{
	struct choice c = {};
	__u32 index;

	if (!select_new(md, m, app, control, &c))
		return SK_DROP;
	in->home = c.home;
	in->info = FLOW_PACKET;
	in->flags = in->evicted = in->raced = 0;
	switch (flow_insert(in)) {
	case FLOW_FULL:
		count(GRM_TABLE_FULL);
		break;
	case FLOW_THERE:
		/* The other insertion's socket; if that one is dead, the choice made above stands. */
		index = GRM_HOME_INDEX(in->home);
		if (bpf_sk_select_reuseport(md, &slots, &index, 0) == 0)
			c.home = in->home;
		break;
	}
	if (in->evicted)
		count(GRM_EMBRYO_EVICTED);
	if (in->raced)
		count(GRM_INSERT_RACE);
	count_new(&c, in->now);
	return SK_PASS;
}

SEC("sk_reuseport/migrate")
int steer_flow(struct sk_reuseport_md *md)
{
	struct grm_meta *m = the_meta();
	struct grm_control *control = the_control();
	struct flow_insert in;
	struct flow_found f;
	struct choice c;
	__u64 word;

	if (!m || !control)
		return SK_DROP;
	if (!read_key(md, &in.key)) {
		count(GRM_TOO_SHORT);
		return steer_new(md, m, 0, false);
	}
	in.now = stamp();
	in.old_last = 0;
	in.old_word = 0;
	if (likely(flow_find(&in.key, &f))) {
		in.old_last = f.last;
		in.old_word = f.word;
		if (likely(!flow_expired(f.last, in.now))) {
			if (likely(home_lives(m, control, f.word, &word)) && select_home(md, f.word, control, word, &c)) {
				flow_seen(&f, count_packet(&c, in.now), in.now);
				return SK_PASS;
			}
			count(GRM_STALE_FLOW);
		}
	}
	return flow_begin(md, m, 0, control, &in);
}

/* The classic program, compiled, takes this one's place. The upper half of its result is 0 unless it gave up. */
static __noinline __u64 cbpf(struct sk_reuseport_md *md)
{
	__u64 result = 0;

	asm volatile("" : "+r"(result), "+r"(md));
	return result;
}

/* What a cookie stands for. False if it is none that was given out, or its bank is gone. */
static __always_inline bool cookie_home(struct grm_meta *m, __u32 cookie, __u32 *home)
{
	__u32 name = READ_ONCE(m->names[cookie & (GRM_NAMES - 1)]), slot = cookie >> 8 & (GRM_SLOTS - 1);
	__u32 app = GRM_NAME_APP(name), bank = GRM_NAME_BANK(name);

	if (!(name & GRM_NAME_USED) || (cookie >> 5 & 7) != GRM_COOKIE_CHECK(GRM_NAME_SERIAL(name), slot))
		return false;
	*home = GRM_HOME(app, bank, slot, GRM_WORD_TAG(READ_ONCE(m->bank[app][bank].word)));
	return true;
}

/*
 * A packet with a cookie goes where that says. The first ones of a flow have
 * none: an embryo keeps them together, for FLOW_YOUNG after the first.
 */
static __always_inline int steer_by_cookie(struct sk_reuseport_md *md, bool apps)
{
	struct grm_meta *m = the_meta();
	struct grm_control *control;
	struct flow_insert in;
	struct grm_stats *s;
	struct flow_found f;
	struct choice c;
	__u32 app = 0, home;
	__u64 result, word;

	if (!m)
		return SK_DROP;
	in.now = stamp();
	result = cbpf(md);
	if (unlikely(result >> 32)) {
		count(GRM_CBPF_ERROR);
	} else if (result <= 0xffff) {
		if (likely(cookie_home(m, result, &home))) {
			control = app_control(GRM_HOME_APP(home), apps);
			if (likely(control && home_lives(m, control, home, &word)) &&
			    select_home(md, home, control, word, &c)) {
				s = count_packet(&c, in.now);
				s->last_assured = in.now;
				return SK_PASS;
			}
		}
		count(GRM_BAD_COOKIE);
	} else if (result >> 31 && (result & 0x7fffffff) < GRM_APPS) {
		app = result & (GRM_APPS - 1);
		if (app >= max_apps) {
			count(GRM_BAD_APP);
			app = 0;
		}
	}
	control = resolve_app(&app, apps);
	if (!control || !read_key(md, &in.key))
		return steer_new(md, m, app, apps);
	in.old_last = 0;
	in.old_word = 0;
	if (flow_find(&in.key, &f)) {
		in.old_last = f.last;
		in.old_word = f.word;
		if (!flow_expired(f.last, in.now) && GRM_HOME_APP((__u32)f.word) == app) {
			if (home_lives(m, control, f.word, &word) && select_home(md, f.word, control, word, &c)) {
				count_packet(&c, in.now);
				return SK_PASS;
			}
			count(GRM_STALE_FLOW);
		}
	}
	return flow_begin(md, m, app, control, &in);
}

SEC("sk_reuseport/migrate")
int steer_cbpf(struct sk_reuseport_md *md)
{
	return steer_by_cookie(md, false);
}

SEC("sk_reuseport/migrate")
int steer_cbpf_apps(struct sk_reuseport_md *md)
{
	return steer_by_cookie(md, true);
}

char _license[] SEC("license") = "Dual MIT/GPL";
