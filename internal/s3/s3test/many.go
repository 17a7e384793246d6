package s3test

import (
	"fmt"
	"html"
	"net/http"
	"sort"
)

// Many is a listing of N objects that are nowhere. Nothing of it is held.
type Many struct {
	N int
	// Key is the name of the ith; larger numbers have larger names.
	Key func(i int) string
}

// ManySize is the size of each, in bytes.
const ManySize = 1234

// List answers a request of ListObjectsV2, whose prefix must be one of all keys.
func (m Many) List(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	after := max(q.Get("start-after"), q.Get("continuation-token"))
	i := sort.Search(m.N, func(i int) bool { return m.Key(i) > after })
	w.Header().Set("Content-Type", "application/xml")
	fmt.Fprintf(w, `<ListBucketResult><Name>b</Name><Prefix>%s</Prefix><MaxKeys>1000</MaxKeys>`, html.EscapeString(q.Get("prefix")))
	n := 0
	for ; i < m.N && n < 1000; i, n = i+1, n+1 {
		fmt.Fprintf(w, `<Contents><Key>%s</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified><ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><Size>%d</Size></Contents>`, m.Key(i), ManySize)
	}
	fmt.Fprintf(w, `<KeyCount>%d</KeyCount><IsTruncated>%v</IsTruncated>`, n, i < m.N)
	if i < m.N {
		fmt.Fprintf(w, `<NextContinuationToken>%s</NextContinuationToken>`, m.Key(i-1))
	}
	fmt.Fprint(w, `</ListBucketResult>`)
}
