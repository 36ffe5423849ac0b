package flowtable

import (
	"net/netip"
	"testing"
	"time"
	"unsafe"
)

func TestSizes(t *testing.T) {
	if size := unsafe.Sizeof(bucket{}); size != BucketSize {
		t.Errorf("a bucket has %d bytes", size)
	}
	if size := unsafe.Sizeof(Header{}); size != BucketSize {
		t.Errorf("the header has %d bytes", size)
	}
	for flows, want := range map[uint32]uint32{1: 2, 8: 2, 9: 4, 65536: 16384, 65537: 32768, 4 << 20: 1 << 20} {
		if got := Buckets(flows); got != want {
			t.Errorf("%d flows have %d buckets, want %d", flows, got, want)
		}
	}
	for d, want := range map[time.Duration]uint32{Unit: 1, Unit + 1: 2, time.Second: 1, 124 * time.Second: 116} {
		if got := Stamps(d); got != want {
			t.Errorf("%v are %d stamps, want %d", d, got, want)
		}
	}
}

func TestNoTable(t *testing.T) {
	if _, err := Count(0); err == nil {
		t.Error("standard input was taken for a flow table")
	}
	if err := Each(-1, func(Entry) bool { return true }); err == nil {
		t.Error("no descriptor was taken for a flow table")
	}
}

func TestEntry(t *testing.T) {
	const now = 1000
	h := Header{Timeout: 116}
	h.Tag[5] = 77
	home := uint64(77<<17 | 5<<8 | 3)
	flow := func(last uint32) bucket {
		b := bucket{}
		b.word[0] = 0xdeadbeef<<32 | home
		b.last[0] = last
		b.info[0] = 3<<24 | answered | 0xe914 // port 5353 on the wire
		b.address[0] = netip.MustParseAddr("192.0.2.1").As16()
		return b
	}
	for _, c := range []struct {
		name string
		last uint32
		live bool
	}{
		{"free", 0, false},
		{"being written", 0xffffffff, false},
		{"tentative", 1<<31 | now, false},
		{"new", now, true},
		{"ahead of our clock", now + 1, true},
		{"young", now - Young, true},
		{"young and old", now - Young - 1, false},
		{"assured, but of few packets", assured | (now - Young - 1), false},
		{"grown, but not assured", grown | (now - Young - 1), false},
		{"assured", assured | grown | (now - 116), true},
		{"expired", assured | grown | (now - 117), false},
	} {
		b := flow(c.last)
		e, ok := b.entry(&h, 0, now)
		if ok != c.live {
			t.Errorf("%s: live %v", c.name, ok)
		}
		want := Entry{Remote: netip.MustParseAddrPort("192.0.2.1:5353"), Bank: 5, Slot: 3, Tag: 77, Answered: true, Packets: 3,
			Assured: c.last&assured != 0, Idle: time.Duration(max(int32(now-c.last&stampBits), 0)) * Unit}
		if ok && e != want {
			t.Errorf("%s: %+v, want %+v", c.name, e, want)
		}
	}
	b := flow(now)
	h.Tag[5]++
	if _, ok := b.entry(&h, 0, now); ok {
		t.Error("a flow of an earlier generation of its bank is live")
	}
}

// FuzzEntry: whatever stands in a bucket, an entry's numbers can be used.
func FuzzEntry(f *testing.F) {
	f.Add(make([]byte, BucketSize), uint32(5), uint32(116))
	f.Fuzz(func(t *testing.T, raw []byte, now, timeout uint32) {
		var b bucket
		copy((*[BucketSize]byte)(unsafe.Pointer(&b))[:], raw)
		for way := range Ways {
			h := Header{Timeout: timeout}
			h.Tag[b.word[way]>>8&31] = uint16(b.word[way] >> 17 & 0x7fff)
			e, ok := b.entry(&h, way, now)
			if ok && (e.App < 0 || e.App > 15 || e.Bank < 0 || e.Bank > 31 || e.Slot < 0 || e.Slot > 255 || e.Idle < 0 || !e.Remote.IsValid()) {
				t.Fatalf("%+v", e)
			}
		}
	})
}
