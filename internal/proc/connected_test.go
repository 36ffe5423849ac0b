package proc

import (
	"net"
	"testing"
)

func TestConnected(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	count := func(network string, port int, wanted bool) int {
		n, err := Connected(network, map[uint16]bool{uint16(port): true}, func(uint64) bool { return wanted })
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	tcp, udp := listener.Addr().(*net.TCPAddr).Port, packets.LocalAddr().(*net.UDPAddr).Port
	if n, m := count("tcp", tcp, true), count("udp", udp, true); n != 0 || m != 0 {
		t.Errorf("%d connections of TCP and %d of UDP before there is one", n, m)
	}
	c, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	d, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: udp})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if n, m := count("tcp", tcp, true), count("udp", d.LocalAddr().(*net.UDPAddr).Port, true); n != 1 || m != 1 {
		t.Errorf("%d connections of TCP and %d of UDP, want 1 and 1", n, m)
	}
	if n, m := count("tcp", tcp, false), count("udp", tcp+1, true); n != 0 || m != 0 {
		t.Errorf("%d and %d connections of others", n, m)
	}
}
