package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"grm/bpfprog/cbpf"
	"grm/bpfprog/model"
)

const explainUsage = `Usage: grm explain --group GROUP --packet PACKET [--from ADDRESS] [--trace]
       grm explain --program FILE --packet PACKET [--trace]
Says what a group's dissector does with a UDP packet, where it would go now, and why; or what a classic BPF
program finds in a packet, before any service uses it.

Flags:
  --group GROUP    such as udp://0.0.0.0:5201 (grm list shows them)
  --program FILE   as bpf_asm -c, tcpdump -dd or tcpdump -ddd write it
  --packet PACKET  a UDP payload in hexadecimal, or a file of tcpdump -w: then each UDP packet in it
  --from ADDRESS   who sent the payload, such as 192.0.2.1:4711
  --trace          each instruction of the classic program, and the registers after it

Exit status 3: there is no such group.

Examples:
  sudo grm explain --group udp://0.0.0.0:5201 --packet 00 --from 192.0.2.1:4711
  sudo grm explain --group udp://0.0.0.0:443 --packet trace.pcap
  grm explain --program quic.cbpf --packet c300000001 --trace
`

func explain(e env, args []string) error {
	f := flag.NewFlagSet("explain", flag.ContinueOnError)
	group := f.String("group", "", "")
	file := f.String("program", "", "")
	packet := f.String("packet", "", "")
	from := f.String("from", "", "")
	trace := f.Bool("trace", false, "")
	if _, err := parse(f, args, 0, 0); err != nil {
		return err
	}
	switch {
	case (*group == "") == (*file == ""):
		return usageError{errors.New("explain: give either --group or --program")}
	case *packet == "":
		return usageError{errors.New("explain: no packet (give --packet with a payload in hexadecimal, or a file of tcpdump -w)")}
	}
	packets, note, err := readPackets(*packet, *from)
	if err != nil {
		return err
	}
	fmt.Fprint(e.stderr, note)
	if *file != "" {
		return explainProgram(e, *file, packets, *trace)
	}
	state, err := e.snapshot(*group)
	if err != nil {
		return err
	}
	for i, p := range packets {
		if state.Dissector == model.Flow && !p.Remote.IsValid() {
			return usageError{errors.New("explain: the dissector flow goes by the sender: give it with --from")}
		}
		v := model.Explain(state, p)
		if err := heading(e, packets, i); err != nil {
			return err
		}
		if *trace {
			for _, line := range v.Trace {
				fmt.Fprintln(e.stdout, " ", line)
			}
		}
		for _, why := range v.Why {
			fmt.Fprintln(e.stdout, " ", why)
		}
		if len(v.Events) > 0 {
			fmt.Fprintf(e.stdout, "  counted: %s\n", join(v.Events))
		}
	}
	return nil
}

// explainProgram runs a classic program that no group has yet.
func explainProgram(e env, file string, packets []model.Packet, trace bool) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	program, err := cbpf.Parse(text)
	if err == nil {
		err = cbpf.Check(program)
	}
	if err != nil {
		return fmt.Errorf("program %s: %w", file, err)
	}
	for i, p := range packets {
		if err := heading(e, packets, i); err != nil {
			return err
		}
		result := program.Run(p.Payload, p.EtherType, func(pc int, a, x uint32) {
			if trace {
				fmt.Fprintf(e.stdout, "  %4d  %-28s a=0x%08x x=0x%08x\n", pc, program.Text(pc), a, x)
			}
		})
		if _, err := fmt.Fprintf(e.stdout, "  %s\n", result); err != nil {
			return err
		}
	}
	return nil
}

// heading tells several packets apart.
func heading(e env, packets []model.Packet, i int) error {
	p := packets[i]
	sender := "a sender that is not said"
	if p.Remote.IsValid() {
		sender = p.Remote.String()
	}
	_, err := fmt.Fprintf(e.stdout, "packet %d of %d: %d bytes from %s\n", i+1, len(packets), len(p.Payload), sender)
	return err
}

func join(events []model.Event) string {
	var names []string
	for _, e := range events {
		names = append(names, string(e))
	}
	return strings.Join(names, ", ")
}

// readPackets reads --packet: a capture file if there is one of that name, else
// a payload. The note is for standard error.
func readPackets(packet, from string) (packets []model.Packet, note string, err error) {
	data, err := os.ReadFile(packet)
	switch {
	case err == nil && from != "":
		return nil, "", usageError{fmt.Errorf("explain: --from is for a payload; the packets in %s have senders", packet)}
	case err == nil:
		packets, others, err := model.ParsePcap(data)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", packet, err)
		}
		if others > 0 {
			note = fmt.Sprintf("grm: %s: %d packets are not UDP, and left out\n", packet, others)
		}
		return packets, note, nil
	case strings.ContainsAny(packet, "./") || !errors.Is(err, fs.ErrNotExist):
		return nil, "", err
	}
	payload, err := model.ParseHex(packet)
	if err != nil {
		return nil, "", usageError{fmt.Errorf("explain: --packet: %w", err)}
	}
	p := model.Packet{Payload: payload, EtherType: 0x0800}
	if from != "" {
		if p.Remote, err = netip.ParseAddrPort(from); err != nil {
			return nil, "", usageError{fmt.Errorf("explain: --from: %w", err)}
		}
		if p.Remote.Addr().Is6() && !p.Remote.Addr().Is4In6() {
			p.EtherType = 0x86dd
		}
	}
	return []model.Packet{p}, "", nil
}
