package model

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Packet is what a group's program knows of a UDP datagram.
type Packet struct {
	Remote    netip.AddrPort
	EtherType uint16 // 0x0800 or 0x86dd
	Payload   []byte
	// Hash is the kernel's hash of the four-tuple. It has a secret in it: it can
	// only be known to a test that makes it up.
	Hash uint32
}

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	protoUDP  = 17
)

// ErrNotUDP says that a packet is whole, but none that a group of UDP sockets gets.
var ErrNotUDP = errors.New("not a UDP datagram")

// ParseHex reads a payload written in hexadecimal; blanks and colons between
// the digits, and 0x before them, are let pass.
func ParseHex(text string) ([]byte, error) {
	digits := strings.NewReplacer(" ", "", "\t", "", "\n", "", "\r", "", ":", "").Replace(strings.TrimPrefix(strings.TrimSpace(text), "0x"))
	payload, err := hex.DecodeString(digits)
	if err != nil {
		return nil, fmt.Errorf("payload in hexadecimal: %w", err)
	}
	return payload, nil
}

// ParseIP reads a whole IPv4 or IPv6 packet. The kernel shows a program no
// fragments, so they are ErrNotUDP too.
func ParseIP(data []byte) (Packet, error) {
	if len(data) == 0 {
		return Packet{}, errTruncated
	}
	switch data[0] >> 4 {
	case 4:
		return parseIPv4(data)
	case 6:
		return parseIPv6(data)
	}
	return Packet{}, fmt.Errorf("%w: IP version %d", ErrNotUDP, data[0]>>4)
}

var errTruncated = errors.New("packet is cut off (record it whole: tcpdump -s 0)")

func parseIPv4(data []byte) (Packet, error) {
	if len(data) < 20 {
		return Packet{}, errTruncated
	}
	header, total := int(data[0]&15)*4, int(binary.BigEndian.Uint16(data[2:]))
	switch {
	case header < 20 || total < header:
		return Packet{}, fmt.Errorf("%w: IPv4 header of %d bytes in %d", ErrNotUDP, header, total)
	case total > len(data):
		return Packet{}, errTruncated
	case binary.BigEndian.Uint16(data[6:])&0x3fff != 0:
		return Packet{}, fmt.Errorf("%w: a fragment", ErrNotUDP)
	case data[9] != protoUDP:
		return Packet{}, fmt.Errorf("%w: IP protocol %d", ErrNotUDP, data[9])
	}
	return parseUDP(netip.AddrFrom4([4]byte(data[12:16])), etherIPv4, data[header:total])
}

func parseIPv6(data []byte) (Packet, error) {
	const header = 40
	if len(data) < header {
		return Packet{}, errTruncated
	}
	remote, next, length := netip.AddrFrom16([16]byte(data[8:24])), data[6], int(binary.BigEndian.Uint16(data[4:]))
	if header+length > len(data) {
		return Packet{}, errTruncated
	}
	rest := data[header : header+length]
	for next != protoUDP {
		const hopByHop, routing, destination = 0, 43, 60
		if next != hopByHop && next != routing && next != destination {
			return Packet{}, fmt.Errorf("%w: IPv6 header %d", ErrNotUDP, next)
		}
		if len(rest) < 8 || len(rest) < 8*(1+int(rest[1])) {
			return Packet{}, fmt.Errorf("%w: IPv6 header %d goes over the end", ErrNotUDP, next)
		}
		next, rest = rest[0], rest[8*(1+int(rest[1])):]
	}
	return parseUDP(remote, etherIPv6, rest)
}

func parseUDP(remote netip.Addr, etherType uint16, data []byte) (Packet, error) {
	const header = 8
	if len(data) < header {
		return Packet{}, fmt.Errorf("%w: %d bytes of UDP header", ErrNotUDP, len(data))
	}
	length := int(binary.BigEndian.Uint16(data[4:]))
	if length < header || length > len(data) {
		return Packet{}, fmt.Errorf("%w: UDP length %d in %d bytes", ErrNotUDP, length, len(data))
	}
	return Packet{
		Remote:    netip.AddrPortFrom(remote, binary.BigEndian.Uint16(data)),
		EtherType: etherType,
		Payload:   data[header:length],
	}, nil
}

// ParsePcap reads the UDP datagrams of a pcap file, as tcpdump -w writes it, and
// says how many other packets there were.
func ParsePcap(data []byte) (packets []Packet, others int, err error) {
	const fileHeader, recordHeader = 24, 16
	if len(data) < fileHeader {
		return nil, 0, errors.New("pcap file: shorter than its header")
	}
	var order binary.ByteOrder = binary.LittleEndian
	switch magic := order.Uint32(data); magic {
	case 0xa1b2c3d4, 0xa1b23c4d: // microseconds, nanoseconds
	case 0xd4c3b2a1, 0x4d3cb2a1:
		order = binary.BigEndian
	case 0x0a0d0d0a:
		return nil, 0, errors.New("pcap file: it is a pcapng file (convert it: tcpdump -r FILE -w NEW)")
	default:
		return nil, 0, fmt.Errorf("pcap file: it begins with 0x%08x (want the output of tcpdump -w)", magic)
	}
	link := order.Uint32(data[20:]) & 0xffff
	if _, err := network(link, nil); errors.Is(err, errLink) {
		return nil, 0, fmt.Errorf("pcap file: %w", err)
	}
	data = data[fileHeader:]
	for n := 0; len(data) > 0; n++ {
		if len(data) < recordHeader {
			return nil, 0, fmt.Errorf("pcap file: record %d: cut off", n)
		}
		length := order.Uint32(data[8:])
		if uint64(length) > uint64(len(data)-recordHeader) {
			return nil, 0, fmt.Errorf("pcap file: record %d: cut off, %d bytes are announced", n, length)
		}
		record := data[recordHeader : recordHeader+int(length)]
		data = data[recordHeader+int(length):]
		ip, err := network(link, record)
		var packet Packet
		if err == nil {
			packet, err = ParseIP(ip)
		}
		switch {
		case err == nil:
			packets = append(packets, packet)
		case errors.Is(err, ErrNotUDP):
			others++
		default:
			return nil, 0, fmt.Errorf("pcap file: record %d: %w", n, err)
		}
	}
	return packets, others, nil
}

var errLink = errors.New("unknown link type")

// network is the IP packet in a frame of one of the link types that a host has.
func network(link uint32, frame []byte) ([]byte, error) {
	var typeAt, header int
	switch link {
	case 101, 12: // raw IP
		return frame, nil
	case 1: // Ethernet
		typeAt, header = 12, 14
	case 113: // Linux "cooked"
		typeAt, header = 14, 16
	case 276: // its second version
		typeAt, header = 0, 20
	default:
		return nil, fmt.Errorf("%w %d (record on an Ethernet interface, or on any)", errLink, link)
	}
	if len(frame) < header {
		return nil, fmt.Errorf("%w: frame of %d bytes", ErrNotUDP, len(frame))
	}
	etherType, frame := binary.BigEndian.Uint16(frame[typeAt:]), frame[header:]
	for (etherType == 0x8100 || etherType == 0x88a8) && len(frame) >= 4 { // VLAN
		etherType, frame = binary.BigEndian.Uint16(frame[2:]), frame[4:]
	}
	if etherType != etherIPv4 && etherType != etherIPv6 {
		return nil, fmt.Errorf("%w: Ethernet type 0x%04x", ErrNotUDP, etherType)
	}
	return frame, nil
}
