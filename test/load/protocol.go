package load

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Datagram is what a request carries and its answer brings back.
type Datagram struct {
	Flow, Seq uint64
	Sent      time.Duration // since the start of the load
}

// Protocol writes requests and reads answers.
type Protocol interface {
	// Request appends a request to buf; size is what it should be padded to, where that is possible.
	Request(buf []byte, d Datagram, size int) []byte
	// Answer reads an answer: which instance sent it and what it answers. An instance that does not tell is "".
	Answer(packet []byte) (instance string, d Datagram, err error)
}

// Echo is the protocol of the echo servers: the request is "FLOW SEQ TIME", the answer "INSTANCE " and the request as it came.
type Echo struct{}

// Request implements [Protocol].
func (Echo) Request(buf []byte, d Datagram, size int) []byte {
	buf = strconv.AppendUint(buf, d.Flow, 10)
	buf = strconv.AppendUint(append(buf, ' '), d.Seq, 10)
	buf = strconv.AppendInt(append(buf, ' '), int64(d.Sent), 10)
	if pad := size - len(buf); pad > 1 {
		buf = append(buf, ' ')
		for range pad - 1 {
			buf = append(buf, '.')
		}
	}
	return buf
}

// Answer implements [Protocol].
func (Echo) Answer(packet []byte) (string, Datagram, error) {
	instance, rest, ok := bytes.Cut(packet, []byte(" "))
	if !ok || len(instance) == 0 {
		return "", Datagram{}, errors.New("no instance")
	}
	rest, _, _ = bytes.Cut(rest, []byte(" ."))
	d, err := parseDatagram(string(rest), " ")
	return string(instance), d, err
}

func parseDatagram(text, separator string) (Datagram, error) {
	fields := strings.Split(text, separator)
	if len(fields) != 3 {
		return Datagram{}, fmt.Errorf("%q: not three numbers", text)
	}
	flow, err1 := strconv.ParseUint(fields[0], 10, 64)
	seq, err2 := strconv.ParseUint(fields[1], 10, 64)
	sent, err3 := strconv.ParseInt(fields[2], 10, 64)
	return Datagram{flow, seq, time.Duration(sent)}, errors.Join(err1, err2, err3)
}

// DNS asks for TXT records of names below a domain: "FLOW-SEQ-TIME.DOMAIN". An answer's record, if there is one, names the instance.
type DNS struct {
	Domain string // with the final dot, DNSDomain if empty
}

// DNSDomain is what [DNS] asks below, by default.
const DNSDomain = "grm.test."

func (p DNS) domain() string { return orDefault(p.Domain, DNSDomain) }

// Request implements [Protocol]. Queries have the size that they have.
func (p DNS) Request(buf []byte, d Datagram, _ int) []byte {
	name := dnsmessage.MustNewName(fmt.Sprintf("%d-%d-%d.%s", d.Flow, d.Seq, int64(d.Sent), p.domain()))
	b := dnsmessage.NewBuilder(buf, dnsmessage.Header{ID: uint16(d.Seq), RecursionDesired: true})
	err := errors.Join(b.StartQuestions(),
		b.Question(dnsmessage.Question{Name: name, Type: dnsmessage.TypeTXT, Class: dnsmessage.ClassINET}))
	packet, err2 := b.Finish()
	if err := errors.Join(err, err2); err != nil {
		panic(err) // three numbers and a constant always make a question
	}
	return packet
}

// Answer implements [Protocol].
func (p DNS) Answer(packet []byte) (string, Datagram, error) {
	var parser dnsmessage.Parser
	head, err := parser.Start(packet)
	if err != nil {
		return "", Datagram{}, err
	}
	if !head.Response || head.RCode != dnsmessage.RCodeSuccess {
		return "", Datagram{}, fmt.Errorf("response %v, %v", head.Response, head.RCode)
	}
	q, err := parser.Question()
	if err != nil {
		return "", Datagram{}, err
	}
	label, ok := strings.CutSuffix(q.Name.String(), "."+p.domain())
	if !ok {
		return "", Datagram{}, fmt.Errorf("%v is not below %s", q.Name, p.domain())
	}
	d, err := parseDatagram(label, "-")
	if err != nil || uint16(d.Seq) != head.ID {
		return "", Datagram{}, errors.Join(err, fmt.Errorf("id %d", head.ID))
	}
	if err := parser.SkipAllQuestions(); err != nil {
		return "", Datagram{}, err
	}
	// A server without a name for itself answers nothing, or something else: that is an answer all the same.
	if h, err := parser.AnswerHeader(); err == nil && h.Type == dnsmessage.TypeTXT {
		if txt, err := parser.TXTResource(); err == nil && len(txt.TXT) > 0 {
			return txt.TXT[0], d, nil
		}
	}
	return "", d, nil
}
