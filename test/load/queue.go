package load

import "container/heap"

// queue holds the flows that have something to send, the next one first.
type queue []*flow

func (q *queue) add(f *flow)        { heap.Push((*byTime)(q), f) }
func (q *queue) remove(i int) *flow { return heap.Remove((*byTime)(q), i).(*flow) }
func (q *queue) fix(i int)          { heap.Fix((*byTime)(q), i) }

type byTime []*flow

func (q byTime) Len() int { return len(q) }
func (q byTime) Less(i, j int) bool {
	if q[i].next != q[j].next {
		return q[i].next < q[j].next
	}
	return q[i].number < q[j].number
}
func (q byTime) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *byTime) Push(f any)   { *q = append(*q, f.(*flow)) }
func (q *byTime) Pop() any {
	last := len(*q) - 1
	f := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return f
}
