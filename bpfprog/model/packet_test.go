package model

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestParseHex(t *testing.T) {
	for _, text := range []string{"00ff10", "0x00FF10\n", "00 ff 10", "00:ff:10"} {
		if got, err := ParseHex(text); err != nil || !bytes.Equal(got, []byte{0, 255, 16}) {
			t.Errorf("%q: %x, %v", text, got, err)
		}
	}
	for _, text := range []string{"0", "xx", "0x0x"} {
		if _, err := ParseHex(text); err == nil || !strings.HasPrefix(err.Error(), "payload in hexadecimal: ") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// udp is a datagram with its UDP header.
func udp(payload string) []byte {
	d := []byte{0x0f, 0xa0, 0x14, 0x51, 0, byte(8 + len(payload)), 0, 0}
	return append(d, payload...)
}

func ipv4Packet(transport []byte) []byte {
	p := make([]byte, 20, 20+len(transport))
	p[0], p[9] = 0x45, protoUDP
	binary.BigEndian.PutUint16(p[2:], uint16(20+len(transport)))
	copy(p[12:], []byte{192, 0, 2, 1, 192, 0, 2, 2})
	return append(p, transport...)
}

func ipv6Packet(next byte, rest []byte) []byte {
	p := make([]byte, 40, 40+len(rest))
	p[0], p[6] = 0x60, next
	binary.BigEndian.PutUint16(p[4:], uint16(len(rest)))
	a := netip.MustParseAddr("2001:db8::1").As16()
	copy(p[8:], a[:])
	return append(p, rest...)
}

func with(p []byte, at int, b byte) []byte {
	p[at] = b
	return p
}

func TestParseIP(t *testing.T) {
	options := append([]byte{60, 0, 1, 4, 0, 0, 0, 0, protoUDP, 1}, make([]byte, 14)...)
	for name, data := range map[string][]byte{
		"IPv4":            ipv4Packet(udp("hello")),
		"IPv4, padded":    append(ipv4Packet(udp("hello")), 0, 0, 0),
		"IPv4, unfragged": with(ipv4Packet(udp("hello")), 6, 0x40),
		"UDP, padded":     ipv4Packet(append(udp("hello"), 7)),
		"IPv6":            ipv6Packet(protoUDP, udp("hello")),
		"IPv6, options":   ipv6Packet(0, append(options, udp("hello")...)),
	} {
		p, err := ParseIP(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want, etherType := client, uint16(etherIPv4)
		if strings.HasPrefix(name, "IPv6") {
			want, etherType = another, etherIPv6
		}
		if p.Remote != want || p.EtherType != etherType || string(p.Payload) != "hello" {
			t.Errorf("%s: %+v", name, p)
		}
	}
	for name, data := range map[string][]byte{
		"version 5":          {0x50},
		"header of 16 bytes": with(ipv4Packet(udp("")), 0, 0x44),
		"fragment":           with(ipv4Packet(udp("")), 6, 0x20),
		"later fragment":     with(ipv4Packet(udp("")), 7, 1),
		"TCP":                with(ipv4Packet(udp("")), 9, 6),
		"IPv6 fragment":      ipv6Packet(44, make([]byte, 20)),
		"IPv6 options":       ipv6Packet(60, []byte{protoUDP, 1, 0, 0, 0, 0, 0, 0}),
		"UDP header":         ipv4Packet([]byte{1, 2, 3}),
		"UDP length, long":   ipv4Packet(with(udp(""), 5, 9)),
		"UDP length, short":  ipv4Packet(with(udp(""), 5, 7)),
	} {
		if p, err := ParseIP(data); !errors.Is(err, ErrNotUDP) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	for _, data := range [][]byte{nil, ipv4Packet(udp("hello"))[:30], {0x45}, {0x60}, ipv6Packet(protoUDP, udp("hello"))[:50]} {
		if p, err := ParseIP(data); !errors.Is(err, errTruncated) {
			t.Errorf("%x: %+v, %v", data, p, err)
		}
	}
}

// pcap is a file of such frames.
func pcap(order binary.AppendByteOrder, magic, link uint32, frames ...[]byte) []byte {
	file := order.AppendUint32(nil, magic)
	file = append(file, make([]byte, 16)...)
	file = order.AppendUint32(file, link)
	for _, f := range frames {
		file = append(file, make([]byte, 8)...)
		file = order.AppendUint32(file, uint32(len(f)))
		file = order.AppendUint32(file, uint32(len(f)))
		file = append(file, f...)
	}
	return file
}

func TestParsePcap(t *testing.T) {
	ethernet := append(make([]byte, 12), 8, 0)
	vlan := append(make([]byte, 12), 0x81, 0, 0, 5, 0x86, 0xdd)
	arp := append(make([]byte, 12), 8, 6, 1, 2, 3)
	cooked := append(make([]byte, 14), 8, 0)
	cooked2 := append([]byte{8, 0}, make([]byte, 18)...)
	v4, v6 := ipv4Packet(udp("four")), ipv6Packet(protoUDP, udp("six"))
	join := func(a, b []byte) []byte { return append(bytes.Clone(a), b...) }
	for name, test := range map[string]struct {
		file    []byte
		packets []string
		others  int
	}{
		"Ethernet":         {pcap(binary.LittleEndian, 0xa1b2c3d4, 1, join(ethernet, v4), arp, join(vlan, v6), ethernet[:9]), []string{"four", "six"}, 2},
		"big-endian":       {pcap(binary.BigEndian, 0xa1b2c3d4, 101, v6, v4), []string{"six", "four"}, 0},
		"nanoseconds":      {pcap(binary.LittleEndian, 0xa1b23c4d, 113, join(cooked, v4)), []string{"four"}, 0},
		"any, v2":          {pcap(binary.LittleEndian, 0xa1b2c3d4, 276, join(cooked2, v4)), []string{"four"}, 0},
		"nothing recorded": {pcap(binary.LittleEndian, 0xa1b2c3d4, 1), nil, 0},
	} {
		packets, others, err := ParsePcap(test.file)
		if err != nil || others != test.others || len(packets) != len(test.packets) {
			t.Errorf("%s: %d packets, %d others, %v", name, len(packets), others, err)
			continue
		}
		for i, p := range packets {
			if string(p.Payload) != test.packets[i] {
				t.Errorf("%s: packet %d is %q", name, i, p.Payload)
			}
		}
	}
	whole := pcap(binary.LittleEndian, 0xa1b2c3d4, 101, v4)
	for want, file := range map[string][]byte{
		"shorter than its header":                           whole[:10],
		"it is a pcapng file":                               append([]byte{10, 13, 13, 10}, make([]byte, 40)...),
		"it begins with 0x78787878":                         bytes.Repeat([]byte("x"), 30),
		"unknown link type 147":                             pcap(binary.LittleEndian, 0xa1b2c3d4, 147),
		"record 0: cut off, 32 bytes are announced":         whole[:len(whole)-1],
		"record 0: cut off":                                 whole[:30],
		"record 0: packet is cut off (record it whole: tcp": pcap(binary.LittleEndian, 0xa1b2c3d4, 101, v4[:25]),
	} {
		if _, _, err := ParsePcap(file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// FuzzParsePcap: what comes out of a file is in it, and written and read again
// it is the same.
func FuzzParsePcap(f *testing.F) {
	f.Add(pcap(binary.LittleEndian, 0xa1b2c3d4, 1, append(append(make([]byte, 12), 8, 0), ipv4Packet(udp("hello"))...)))
	f.Add(pcap(binary.BigEndian, 0xa1b23c4d, 101, ipv6Packet(0, append([]byte{protoUDP, 0, 1, 4, 0, 0, 0, 0}, udp("x")...))))
	f.Fuzz(func(t *testing.T, file []byte) {
		packets, others, err := ParsePcap(file)
		if err != nil {
			return
		}
		if 16*(len(packets)+others)+24 > len(file) {
			t.Fatalf("%d packets in %d bytes", len(packets)+others, len(file))
		}
		var frames [][]byte
		for _, p := range packets {
			if !bytes.Contains(file, p.Payload) {
				t.Fatalf("%x is not in the file", p.Payload)
			}
			if p.Remote.Addr().Is4() != (p.EtherType == etherIPv4) {
				t.Fatalf("%+v", p)
			}
			if len(p.Payload) > 200 || p.EtherType != etherIPv4 {
				continue
			}
			frame := ipv4Packet(udp(string(p.Payload)))
			copy(frame[12:], p.Remote.Addr().AsSlice())
			binary.BigEndian.PutUint16(frame[20:], p.Remote.Port())
			frames = append(frames, frame)
		}
		again, _, err := ParsePcap(pcap(binary.LittleEndian, 0xa1b2c3d4, 101, frames...))
		if err != nil || len(again) != len(frames) {
			t.Fatalf("%d packets of %d: %v", len(again), len(frames), err)
		}
		for i, p := range again {
			if got := ipv4Packet(udp(string(p.Payload))); hex.EncodeToString(got[28:]) != hex.EncodeToString(frames[i][28:]) {
				t.Fatalf("%x became %x", frames[i], got)
			}
		}
	})
}
