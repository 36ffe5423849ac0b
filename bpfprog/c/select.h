/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* From a bank, or a home, or an app, to a socket that lives. */
#ifndef GRM_SELECT_H
#define GRM_SELECT_H

#include "group.h"

#define NEIGHBOURS 4 /* slots tried from one place of a bank, before all are from a second one */

/* The chosen socket of a packet. */
struct choice {
	struct grm_control *control; /* of its app */
	__u32 home;
	__u32 tries;                 /* dead slots that were asked before */
	__u32 skipped;               /* newer banks without a live socket */
};

static __always_inline struct grm_control *app_control(__u32 app, bool apps)
{
	return apps ? control_of_app(app) : the_control();
}

/* What the searches below found: home | tries << 32 | skipped << 48. */
#define NOWHERE (~0ull)

static __always_inline void found(struct choice *c, __u64 what)
{
	c->home = what;
	c->tries = what >> 32 & 0xffff;
	c->skipped = what >> 48;
}

/*
 * The searches are global functions: the verifier looks at them once. They run
 * only if the first socket that was asked is dead.
 */

struct walk {
	struct sk_reuseport_md *md;
	__u64 what;
	__u32 first, at, n;
};

static long step(__u32 i, struct walk *w)
{
	__u32 at = w->at + i, home, index;

	if (at >= w->n)
		at -= w->n;
	home = w->first | (at & (GRM_SLOTS - 1));
	index = GRM_HOME_INDEX(home);
	if (bpf_sk_select_reuseport(w->md, &slots, &index, 0))
		return 0;
	w->what = home | (__u64)(NEIGHBOURS + i) << 32;
	return 1;
}

/*
 * The first socket that lives from one place of a bank on. The verifier goes
 * once through the step of bpf_loop (Linux 5.17), 256 times through a loop.
 */
__noinline __u64 search_all(struct sk_reuseport_md *md, __u32 first, __u32 at, __u32 n)
{
	struct walk w = { .md = md, .what = NOWHERE, .first = first, .at = at, .n = n };

	bpf_loop(n, step, &w, 0);
	return w.what;
}

/*
 * A socket of one bank, by the packet's hash: four neighbours from one place,
 * then all of them from another, so that the one behind many dead ones does
 * not get all the packets of these.
 */
__noinline __u64 search_bank(struct sk_reuseport_md *md, __u32 app, __u32 bank, __u64 word)
{
	__u32 n = GRM_WORD_SOCKETS(word), at = (__u64)md->hash * n >> 32;
	__u32 first = GRM_HOME(app & (GRM_APPS - 1), bank & (GRM_BANKS - 1), 0, GRM_WORD_TAG(word));

	for (__u32 i = 0; i < NEIGHBOURS; i++) {
		__u32 home, index;

		if (i >= n)
			break;
		home = first | (at & (GRM_SLOTS - 1));
		index = GRM_HOME_INDEX(home);
		if (bpf_sk_select_reuseport(md, &slots, &index, 0) == 0)
			return home | (__u64)i << 32;
		if (++at >= n)
			at = 0;
	}
	if (n <= NEIGHBOURS)
		return NOWHERE;
	at = (__u64)(md->hash * 0x9e3779b1u) * n >> 32;
	return search_all(md, first, at, n);
}

/* A socket of the newest bank of an order that has a live one. */
__noinline __u64 search_order(struct sk_reuseport_md *md, __u32 app, __u64 order)
{
	struct grm_meta *m = the_meta();

	if (!m)
		return NOWHERE;
	for (__u32 i = 0; i < GRM_FALLBACK; i++) {
		__u32 bank = order >> (4 + 5 * i) & (GRM_BANKS - 1);
		__u64 what;

		if (i >= (order & 15))
			break;
		what = search_bank(md, app, bank, READ_ONCE(m->bank[app & (GRM_APPS - 1)][bank].word));
		if (what != NOWHERE)
			return what | (__u64)i << 48;
	}
	return NOWHERE;
}

/* A place that a flow or a cookie names. False if nothing of its bank lives. */
static __always_inline bool select_home(struct sk_reuseport_md *md, __u32 home, struct grm_control *control,
					__u64 word, struct choice *c)
{
	__u32 index = GRM_HOME_INDEX(home);
	__u64 what;

	c->control = control;
	c->home = home;
	c->tries = 0;
	if (likely(bpf_sk_select_reuseport(md, &slots, &index, 0) == 0))
		return true;
	count(GRM_DEAD_SLOT);
	what = search_bank(md, GRM_HOME_APP(home), GRM_HOME_BANK(home), word);
	if (what == NOWHERE)
		return false;
	found(c, what);
	c->tries++;
	return true;
}

/* Does the bank that home names still belong to that generation, and serve its flows? */
static __always_inline bool home_lives(struct grm_meta *m, struct grm_control *control, __u32 home, __u64 *word)
{
	__u32 bank = GRM_HOME_BANK(home);

	*word = READ_ONCE(m->bank[GRM_HOME_APP(home)][bank].word);
	return GRM_WORD_SOCKETS(*word) > GRM_HOME_SLOT(home) && GRM_WORD_TAG(*word) == GRM_HOME_TAG(home) &&
	       READ_ONCE(control->alive) >> bank & 1;
}

/* The app that a new flow is for, and its control map: app 0 if its own service is gone, or has never served. */
static __always_inline struct grm_control *resolve_app(__u32 *app, bool apps)
{
	struct grm_control *c = app_control(*app, apps);

	if (!apps || !*app || (c && READ_ONCE(c->order) & 15))
		return c;
	count(GRM_APP_GONE);
	*app = 0;
	return app_control(0, apps);
}

/*
 * A new flow: the working bank, else the next newest of the order that has a
 * live socket. Without one the packet is dropped: if a program selects nothing,
 * the kernel hashes over all sockets of the group, whoever owns them.
 */
static __always_inline bool select_new(struct sk_reuseport_md *md, struct grm_meta *m, __u32 app,
				       struct grm_control *control, struct choice *c)
{
	__u32 bank, index, n;
	__u64 order, word, what;

	if (!control) {
		count(GRM_DROPPED_NO_SOCKET);
		return false;
	}
	if (unlikely(READ_ONCE(control->closing))) {
		count(GRM_DROPPED_CLOSING);
		return false;
	}
	c->control = control;
	c->tries = c->skipped = 0;
	order = READ_ONCE(control->order);
	bank = order >> 4 & (GRM_BANKS - 1);
	word = READ_ONCE(m->bank[app & (GRM_APPS - 1)][bank].word);
	n = GRM_WORD_SOCKETS(word);
	if (likely(order & 15 && n)) {
		c->home = GRM_HOME(app & (GRM_APPS - 1), bank, (__u64)md->hash * n >> 32 & (GRM_SLOTS - 1),
				   GRM_WORD_TAG(word));
		index = GRM_HOME_INDEX(c->home);
		if (likely(bpf_sk_select_reuseport(md, &slots, &index, 0) == 0))
			return true;
	}
	what = search_order(md, app, order);
	if (what == NOWHERE) {
		count(GRM_DROPPED_NO_SOCKET);
		return false;
	}
	found(c, what);
	return true;
}

/* Counts a packet for the bank that gets it. */
static __always_inline struct grm_stats *count_packet(const struct choice *c, __u32 now)
{
	struct grm_stats *s = stats_of(c->control, GRM_HOME_BANK(c->home));

	s->packets++;
	if (unlikely(c->tries))
		s->other_slot++;
	s->last_packet = now;
	return s;
}

static __always_inline void count_new(const struct choice *c, __u32 now)
{
	struct grm_stats *s = count_packet(c, now);

	s->new_flows++;
	if (unlikely(c->skipped))
		s->fell_back++;
}

#endif
